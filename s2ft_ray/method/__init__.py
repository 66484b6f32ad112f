"""The method, on torch alone: what may be imported from it is listed here."""

from s2ft_ray.config import S2FTConfig
from s2ft_ray.method.adapter import Adapter
from s2ft_ray.method.architectures import (
    check_packing,
    check_supported,
    num_positions,
    supported_architectures,
)
from s2ft_ray.method.base_files import BaseFiles
from s2ft_ray.method.calibration import SharedCalibration
from s2ft_ray.method.choice import choose
from s2ft_ray.method.conversion import (
    convert,
    convert_like,
    convert_with,
    extract_adapter,
    restore,
    slice_layers,
)
from s2ft_ray.method.fingerprint import base_fingerprint_of_files
from s2ft_ray.method.fusion import fuse
from s2ft_ray.method.linear import S2FTLinear
from s2ft_ray.method.merged_export import copy_settings
from s2ft_ray.method.parts import AdapterSlice, BaseInfo
from s2ft_ray.method.scores import looks_at_data
from s2ft_ray.method.selection import ModuleSelection, Selection, count_trainable
from s2ft_ray.method.sharded import gathers_called_by
from s2ft_ray.method.slices import BUCKET_BYTES, write_back
from s2ft_ray.method.switching import base_fingerprint, switched_fingerprints
from s2ft_ray.method.weights import base_entries

__all__ = [
    "BUCKET_BYTES",
    "Adapter",
    "AdapterSlice",
    "BaseFiles",
    "BaseInfo",
    "ModuleSelection",
    "S2FTConfig",
    "S2FTLinear",
    "Selection",
    "SharedCalibration",
    "base_entries",
    "base_fingerprint",
    "base_fingerprint_of_files",
    "check_packing",
    "check_supported",
    "choose",
    "convert",
    "convert_like",
    "convert_with",
    "copy_settings",
    "count_trainable",
    "extract_adapter",
    "fuse",
    "gathers_called_by",
    "looks_at_data",
    "num_positions",
    "restore",
    "slice_layers",
    "supported_architectures",
    "switched_fingerprints",
    "write_back",
]
