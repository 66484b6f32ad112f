"""Base models by name: the embedded ``s2ft://tiny``, folders in Hugging Face layout, hub names.

What loads is itself loaded on first use: where a base is needs no torch.
"""

from typing import TYPE_CHECKING, Any

from s2ft_ray.bases.folders import base_name, find_folder, local_folder, resolve_base

if TYPE_CHECKING:
    from s2ft_ray.bases.loading import (
        TRIAL_TURNS,
        load_base_model,
        load_model_config,
        load_tokenizer,
        read_template,
    )

__all__ = [
    "TRIAL_TURNS",
    "base_name",
    "find_folder",
    "load_base_model",
    "load_model_config",
    "load_tokenizer",
    "local_folder",
    "read_template",
    "resolve_base",
]

if not TYPE_CHECKING:  # a checker would believe every name of it

    def __getattr__(name: str) -> Any:
        if name in __all__:
            from s2ft_ray.bases import loading

            return getattr(loading, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
