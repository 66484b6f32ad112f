"""What the tests of the engine share: adapters of the embedded base, and what merged models say."""

import asyncio
import copy
import gc
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from s2ft_ray.bases import load_base_model, load_tokenizer
from s2ft_ray.config import ModelConfig, S2FTConfig
from s2ft_ray.method import Adapter, AdapterSlice, BaseInfo, base_fingerprint
from s2ft_ray.serving.engine import Engine
from s2ft_ray.serving.requests import AdapterKey, GenerationRequest, SamplingParams

# Stopping an engine collects garbage: half a second each time over all that was imported here.
gc.freeze()
TINY = ModelConfig(name_or_path="s2ft://tiny")
BUDGETS = [
    {"o": 16, "down": 12},
    {"o": 16, "down": 12},
    {"o": 16, "down": 12},
    {"q": 16, "k": 16, "v": 16, "up": 5, "gate": 5},
    {"q": 16, "k": 16, "v": 16, "up": 5, "gate": 5},
    {"v": 16, "down": 30},
]
"""Of each adapter: rows or columns by projection."""
MODULES = {
    "q": ("self_attn.q_proj", "out", 128, 128),
    "k": ("self_attn.k_proj", "out", 64, 128),
    "v": ("self_attn.v_proj", "out", 64, 128),
    "o": ("self_attn.o_proj", "in", 128, 128),
    "up": ("mlp.up_proj", "out", 384, 128),
    "gate": ("mlp.gate_proj", "out", 384, 128),
    "down": ("mlp.down_proj", "in", 128, 384),
}


@cache
def base() -> PreTrainedModel:
    return load_base_model(TINY)


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(TINY)


def build_adapter(seed: int, counts: dict[str, int], model: torch.nn.Module) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    slices = {}
    for layer in range(4):
        for projection, count in counts.items():
            path, side, rows, columns = MODULES[projection]
            whole = columns if side == "in" else rows
            indices = torch.randperm(whole, generator=generator)[:count].sort().values
            shape = (rows, count) if side == "in" else (count, columns)
            delta = 0.08 * torch.randn(shape, generator=generator)
            name = f"model.layers.{layer}.{path}"
            slices[name] = AdapterSlice(side, indices.int(), delta, size=whole)
    return Adapter(slices, BaseInfo("s2ft://tiny", None, base_fingerprint(model)), S2FTConfig())


@cache
def adapters() -> dict[AdapterKey, Adapter]:
    found = {}
    for seed, counts in enumerate(BUDGETS):
        adapter = build_adapter(seed, counts, base())
        found[AdapterKey(f"acme.bot-{seed}", "1", adapter.fingerprint)] = adapter
    return found


def merged(key: AdapterKey | None) -> PreTrainedModel:
    model = copy.deepcopy(base())
    if key is not None:
        adapters()[key].switch_into(model)
    return model


@asynccontextmanager
async def running_engine(
    load: Callable[[AdapterKey], Adapter] | None = None, **changes: Any
) -> AsyncIterator[Engine]:
    """An engine over the embedded base, which finds `adapters()`."""
    sizes = {"slot_bytes": 2**22, "cache_tokens": 1024, "max_batch_tokens": 128, "page_size": 16}
    options = {**sizes, **changes}
    model = copy.deepcopy(base())
    engine = Engine(model, tokenizer(), load or adapters().__getitem__, **options)
    engine.start()
    try:
        yield engine
    finally:
        await asyncio.to_thread(engine.stop, 5.0)


def request(
    request_id: str,
    prompt_ids: Sequence[int],
    adapter: AdapterKey | None = None,
    **params: Any,
) -> GenerationRequest:
    given = SamplingParams(**{"temperature": 0.0, "ignore_eos": True, **params})
    return GenerationRequest(request_id, tuple(prompt_ids), given, adapter, tenant=None)


async def tokens(engine: Engine, asked: GenerationRequest) -> list[int]:
    return [output.token_id async for output in engine.generate(asked)]
