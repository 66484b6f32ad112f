"""What the serving tests stand on: registered adapters of the embedded base, merged answers."""

import copy
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from nodes import Node
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from s2ft_ray.bases import load_base_model, load_tokenizer
from s2ft_ray.config import ModelConfig, S2FTConfig, parse_config
from s2ft_ray.method import Adapter, convert, extract_adapter, slice_layers
from s2ft_ray.registry import register_adapter

BASE = "s2ft://tiny"


def free_port() -> int:
    """Return a port of loopback that nobody has now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def make_adapter(seed: int, scale: float = 0.1) -> Adapter:
    """Make an adapter of the embedded base with random deltas, other ones for each seed."""
    model = load_base_model(ModelConfig(name_or_path=BASE))
    budgets = {"o": 0.25, "down": 0.1, "up": 0.05}
    convert(model, S2FTConfig(budgets=budgets, seed=seed))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in slice_layers(model):
            layer.slice += scale * torch.randn(layer.slice.shape, generator=draw)
            layer.write_back()
    return extract_adapter(model)


def register(node: Node, folder: Path, adapter: Adapter, name: str, alias: str) -> int:
    """Register an adapter as the newest version of ``tenant.name``; return the version."""
    uri = node.env["MLFLOW_TRACKING_URI"]
    tenant, _, model = name.partition(".")
    config = parse_config(
        {
            "tenant": tenant,
            "name": model,
            "data": {"train": "none.jsonl"},
            "registry": {"alias": alias},
            "tracking": {"uri": uri},
        }
    )
    adapter.save(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("S2FT_HOME", str(node.home))
        client = MlflowClient(uri, uri)
        experiment = client.get_experiment_by_name("served")
        place = (node.home / "mlartifacts" / "served").as_uri()
        experiment_id = (
            experiment.experiment_id if experiment else client.create_experiment("served", place)
        )
        run = client.create_run(experiment_id)
        return register_adapter(folder, config, mlflow_run_id=run.info.run_id).version


def save_other_base(folder: Path) -> None:
    """Save another base: the embedded one with its first two layers exchanged."""
    base = ModelConfig(name_or_path=BASE)
    model = load_base_model(base)
    layers = model.model.layers
    first, second = (copy.deepcopy(layers[i].state_dict()) for i in (0, 1))
    layers[0].load_state_dict(second)
    layers[1].load_state_dict(first)
    model.save_pretrained(folder)
    load_tokenizer(base).save_pretrained(folder)


@dataclass
class Merged:
    """A base, into which each adapter is switched in turn."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(cls, name: str = BASE) -> "Merged":
        """Load a base."""
        base = ModelConfig(name_or_path=name)
        return cls(load_base_model(base), load_tokenizer(base))

    @torch.inference_mode()
    def continue_text(self, adapter: Adapter | None, text: str, num_tokens: int) -> str:
        """Return the greedy continuation of a plain text."""
        ids = self.tokenizer(text, return_tensors="pt")["input_ids"]
        return self._answer(adapter, ids, num_tokens)

    @torch.inference_mode()
    def score(self, adapter: Adapter, text: str, end: str) -> float:
        """Return the logprob of `end` after `text`, whose tokens are those of the whole."""
        ids = self.tokenizer(text + end, return_tensors="pt")["input_ids"]
        first = len(self.tokenizer(text)["input_ids"])
        adapter.switch_into(self.model)
        try:
            logprobs = self.model(ids).logits.float().log_softmax(-1)
        finally:
            adapter.switch_out(self.model)
        own = logprobs[0, first - 1 : -1].gather(-1, ids[0, first:, None])
        return float(own.sum())

    @torch.inference_mode()
    def chat(self, adapter: Adapter | None, text: str, num_tokens: int) -> str:
        """Return the greedy answer to one user's turn."""
        turns = [{"role": "user", "content": text}]
        rendered = self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
        ids = self.tokenizer(rendered, add_special_tokens=False, return_tensors="pt")["input_ids"]
        return self._answer(adapter, ids, num_tokens)

    def _answer(self, adapter: Adapter | None, ids: Any, num_tokens: int) -> str:
        if adapter is not None:
            adapter.switch_into(self.model)
        try:
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_tokens,
                do_sample=False,
            )
        finally:
            if adapter is not None:
                adapter.switch_out(self.model)
        return self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
