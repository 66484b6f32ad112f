"""Served equals merged for every family: fused and transposed weights, odd head sizes, experts."""

import asyncio
import copy
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch
from method_models import ARCHITECTURES, build_model, projections_of
from serving_worlds import request, tokenizer, tokens
from transformers import PreTrainedModel

from s2ft_ray.bases import load_base_model
from s2ft_ray.config import ModelConfig, S2FTConfig
from s2ft_ray.errors import AdapterError
from s2ft_ray.method import Adapter, convert, extract_adapter, restore, slice_layers
from s2ft_ray.serving.engine import Engine
from s2ft_ray.serving.requests import AdapterKey

STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260k"
EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe")
DENSE = [family for family in ARCHITECTURES if family not in EXPERTS]
NUM_TOKENS = 6


def train(model: PreTrainedModel, budgets: dict[str, float], seed: int, size: float) -> Adapter:
    """An adapter of noise, made the way a training run makes one."""
    convert(model, S2FTConfig(budgets=budgets, seed=seed))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in slice_layers(model):
            noise = torch.randn(layer.slice.shape, generator=generator)
            layer.slice.add_(size * layer.slice.std() * noise)
    adapter = extract_adapter(model)
    restore(model)
    return adapter


def merged_tokens(
    model: PreTrainedModel, adapter: Adapter | None, prompt: tuple[int, ...]
) -> tuple[list[int], torch.Tensor]:
    """Return a merged model's greedy tokens, and its logprobs [T - 1, V] of the prompt."""
    merged = copy.deepcopy(model)
    if adapter is not None:
        adapter.switch_into(merged)
    ids = torch.tensor([prompt])
    with torch.no_grad():
        logprobs = merged(ids).logits[0, :-1].log_softmax(-1)
        for _ in range(NUM_TOKENS):
            chosen = merged(ids).logits[0, -1].argmax()
            ids = torch.cat([ids, chosen[None, None]], dim=1)
    return ids[0, len(prompt) :].tolist(), logprobs


@asynccontextmanager
async def engine_of(
    model: PreTrainedModel, adapters: dict[AdapterKey, Adapter]
) -> AsyncIterator[Engine]:
    engine = Engine(
        copy.deepcopy(model),
        tokenizer(),
        adapters.__getitem__,
        slot_bytes=2**22,
        cache_tokens=512,
        max_batch_tokens=64,
        page_size=16,
    )
    engine.start()
    try:
        yield engine
    finally:
        await asyncio.to_thread(engine.stop, 5.0)


def check(model: PreTrainedModel, adapters: list[Adapter], prompts: list[tuple[int, ...]]) -> None:
    """Compare what is served, all at once, with the merged models' greedy tokens and logprobs."""
    by_key = {key_of(adapter): adapter for adapter in adapters}
    wanted, scores = {}, {}
    for key in [None, *by_key]:
        for prompt in prompts:
            adapter = None if key is None else by_key[key]
            wanted[key, prompt], scores[key, prompt] = merged_tokens(model, adapter, prompt)

    async def serve() -> None:
        async with engine_of(model, by_key) as engine:
            each = (
                tokens(engine, request(str(i), prompt, key, max_tokens=NUM_TOKENS))
                for i, (key, prompt) in enumerate(wanted)
            )
            assert await asyncio.gather(*each) == list(wanted.values())
            for (key, prompt), logprobs in scores.items():
                scored = await engine.score(prompt, key)
                own = logprobs.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
                told = torch.tensor([token.logprob for token in scored[1:]])
                torch.testing.assert_close(told, own, atol=2e-3, rtol=1e-3)

    asyncio.run(serve())


def key_of(adapter: Adapter) -> AdapterKey:
    return AdapterKey(f"a.{adapter.fingerprint[:8]}", "1", adapter.fingerprint)


@pytest.mark.parametrize("family", DENSE)
def test_served_is_merged(family: str) -> None:
    model = build_model(family)
    budgets = dict.fromkeys(projections_of(family), 0.13)
    half = {"o": 0.2, "down": 0.05}
    adapters = [train(model, budgets, 0, 2.0), train(model, half, 1, 2.0), train(model, half, 2, 2)]
    check(model, adapters, [(1, 7, 9), tuple(range(3, 24))])


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_are_served_by_a_dedicated_engine_alone(family: str) -> None:
    model = build_model(family)
    attention = train(model, {"o": 0.2, "v": 0.5}, 0, 2.0)
    experts = train(model, {"down": 0.1, "up": 0.1, "gate": 0.1}, 1, 2.0)
    prompt = (1, 7, 9)
    check(model, [attention], [prompt])

    async def serve() -> None:
        key = key_of(experts)
        async with engine_of(model, {key: experts}) as engine:
            asked = request("a", prompt, key, max_tokens=NUM_TOKENS)
            with pytest.raises(AdapterError, match="experts"):
                await tokens(engine, asked)
            await engine.dedicate(key)
            assert await tokens(engine, asked) == merged_tokens(model, experts, prompt)[0]

    asyncio.run(serve())


@pytest.mark.skipif(not STORIES.is_dir(), reason="no stories260k beside the repository")
def test_served_is_merged_on_a_trained_model() -> None:
    model = load_base_model(ModelConfig(name_or_path=str(STORIES)))
    budgets = [{"o": 0.2, "down": 0.1}, {"v": 0.3, "up": 0.1, "gate": 0.1}, {"o": 0.1, "q": 0.2}]
    adapters = [train(model, it, seed, 1.0) for seed, it in enumerate(budgets)]
    check(model, adapters, [(1, 403, 407), (1, *range(260, 300))])
