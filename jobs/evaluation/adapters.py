"""The adapter or base that is evaluated, and its model."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from s2ft_ray.bases import load_base_model, load_tokenizer
from s2ft_ray.config import ModelConfig
from s2ft_ray.errors import AdapterError
from s2ft_ray.method import Adapter
from s2ft_ray.registry import resolve_adapter


@dataclass(frozen=True)
class NamedAdapter:
    """An adapter and what it is called: "<name> version <n>", or its folder."""

    title: str
    adapter: Adapter
    registered: str | None
    """``<tenant>.<name>:<version>``; None: it came from a folder."""


def load_adapter(name: str) -> NamedAdapter:
    """Return the adapter of a folder or of a registered name."""
    if (Path(name) / "adapter_config.json").is_file():
        return NamedAdapter(name, Adapter.load(name), None)
    found = resolve_adapter(name)
    return NamedAdapter(
        f"{found.name} version {found.version}",
        Adapter.load(found.folder),
        f"{found.name}:{found.version}",
    )


def load_base_of(adapter: Adapter) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the adapter's base, without it, and the tokenizer that it was trained with."""
    if adapter.base.name is None:
        raise AdapterError("the adapter doesn't say the name of its base")
    config = ModelConfig(name_or_path=adapter.base.name, revision=adapter.base.revision)
    return load_base(config, adapter.training.get("data", {}).get("chat_template"))


def load_base(
    config: ModelConfig, chat_template: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a base on this machine's device, and its tokenizer."""
    tokenizer = load_tokenizer(config, chat_template)
    model = load_base_model(config).to("cuda" if torch.cuda.is_available() else "cpu")
    return model, tokenizer
