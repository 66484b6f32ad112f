"""Base models by name: the embedded ``s2ft://tiny``, folders in Hugging Face layout, hub names."""

from s2ft_ray.bases.folders import base_name, find_folder, local_folder, resolve_base
from s2ft_ray.bases.loading import load_base_model, load_model_config, load_tokenizer

__all__ = [
    "base_name",
    "find_folder",
    "load_base_model",
    "load_model_config",
    "load_tokenizer",
    "local_folder",
    "resolve_base",
]
