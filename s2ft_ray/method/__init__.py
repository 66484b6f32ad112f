"""The method, on torch alone: what may be imported from it is listed here."""

from s2ft_ray.config import S2FTConfig
from s2ft_ray.method.adapter import Adapter
from s2ft_ray.method.architectures import check_supported, supported_architectures
from s2ft_ray.method.conversion import (
    convert,
    convert_like,
    extract_adapter,
    restore,
    slice_layers,
)
from s2ft_ray.method.fingerprint import base_fingerprint_of_files
from s2ft_ray.method.fusion import fuse
from s2ft_ray.method.linear import S2FTLinear
from s2ft_ray.method.parts import AdapterSlice, BaseInfo
from s2ft_ray.method.selection import ModuleSelection, Selection, count_trainable
from s2ft_ray.method.switching import base_fingerprint, switched_fingerprints

__all__ = [
    "Adapter",
    "AdapterSlice",
    "BaseInfo",
    "ModuleSelection",
    "S2FTConfig",
    "S2FTLinear",
    "Selection",
    "base_fingerprint",
    "base_fingerprint_of_files",
    "check_supported",
    "convert",
    "convert_like",
    "count_trainable",
    "extract_adapter",
    "fuse",
    "restore",
    "slice_layers",
    "supported_architectures",
    "switched_fingerprints",
]
