"""An adapter in memory: which entries of which weights change, and by how much.

Invariant: indices are rows or columns of the base's weights in their original order, ascending;
deltas are fp32 on the CPU. An adapter is a value: nothing changes one after it was made.

Dimensions: D out, F in, K selected.
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from s2ft_ray.config import S2FTConfig
from s2ft_ray.method import adapter_files, merged_export, peft_export, switching
from s2ft_ray.method.fingerprint import fingerprint_slices
from s2ft_ray.method.parts import AdapterSlice, BaseInfo


@dataclass(frozen=True, eq=False)
class Adapter:
    """A trained S2FT adapter."""

    slices: dict[str, AdapterSlice]
    """By module name."""
    base: BaseInfo
    config: S2FTConfig
    training: dict[str, Any] = field(default_factory=dict)
    """A summary of how it was trained: JSON, free of form, no part of the fingerprint."""

    @cached_property
    def fingerprint(self) -> str:
        """The adapter's identity: sha256 of its slices and its base's fingerprint."""
        return fingerprint_slices(self.slices, self.base.fingerprint)

    @property
    def num_parameters(self) -> int:
        """How many entries of the base it changes."""
        return sum(part.delta.numel() for part in self.slices.values())

    def save(self, path: str | Path) -> None:
        """Write ``adapter_config.json`` and ``adapter_model.safetensors`` into a folder."""
        adapter_files.write(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> "Adapter":
        """Read an adapter's folder. AdapterError, with every fault, where it can't be trusted."""
        return cls(*adapter_files.read(Path(path)))

    def switch_into(self, model: nn.Module) -> None:
        """Add the deltas to a plain model's weights, in place.

        Several adapters stack. AdapterError, with the model as it was, where this adapter is in
        already, binds to a missing or mis-shaped module, or was trained on another base.
        """
        switching.switch_in(model, self)

    def switch_out(self, model: nn.Module) -> None:
        """Put back, bitwise, what the adapter replaced. AdapterError unless it was the last in."""
        switching.switch_out(model, self)

    def export_peft(self, path: str | Path, uniform_rank: bool = False) -> None:
        """Write the adapter as a LoRA directory for PEFT, vLLM, SGLang or Ray Serve LLM.

        Exact: the product of its factors is the delta. `uniform_rank` pads every module to the
        largest rank, for consumers that read none of ``rank_pattern``. Fused experts PEFT alone
        takes. AdapterError above rank 512, which servers don't take: use `export_merged`.
        """
        peft_export.write_peft(self, Path(path), uniform_rank=uniform_rank)

    def export_merged(self, model: nn.Module | str | Path, path: str | Path) -> None:
        """Write a plain Hugging Face checkpoint of the base with this adapter in.

        `model` is the loaded base, which must have ``save_pretrained`` and is afterwards as it was
        before, or the base's own folder: then nothing is loaded, one matrix is in memory at a
        time, and the tokenizer comes along. AdapterError where it isn't the adapter's base.
        """
        if isinstance(model, nn.Module):
            merged_export.save_merged(self, model, Path(path))
        else:
            merged_export.merge_files(self, Path(model), Path(path))
