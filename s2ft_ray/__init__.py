"""S2FT on Ray: fine-tune and serve large language models by structured sparsity.

The method's names are loaded on first use, so that ``import s2ft_ray`` costs no torch.
"""

from typing import TYPE_CHECKING, Any

from s2ft_ray.config import S2FTConfig

if TYPE_CHECKING:
    from s2ft_ray.method import Adapter, convert, extract_adapter, fuse, restore

__version__ = "0.1.0"
__all__ = ["Adapter", "S2FTConfig", "convert", "extract_adapter", "fuse", "restore"]

if not TYPE_CHECKING:  # a checker would believe every name of it

    def __getattr__(name: str) -> Any:
        if name in __all__:
            from s2ft_ray import method

            return getattr(method, name)
        raise AttributeError(f"module 's2ft_ray' has no attribute {name!r}")
