"""The engine on a GPU against merged models: the numbers of each request, and whose they are.

The base is the embedded one; its adapters change either side's projections, in several widths.
Prompts are of every length that is routed another way: single tokens, blocks, long ranges.
"""

import asyncio
import copy
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from typing import Any

import pytest
import torch
from serving_worlds import adapters, base, merged, request, tokenizer, tokens
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from s2ft_ray.errors import ServingError
from s2ft_ray.method import Adapter
from s2ft_ray.serving.device_slots import Slot
from s2ft_ray.serving.engine import Engine
from s2ft_ray.serving.requests import AdapterKey, TokenOutput

DEVICE = "cuda"
NUM_TOKENS = 8
PROMPTS = [(1, 52, 83), (1, *range(100, 117)), (1, *range(300, 341)), (1, *range(200, 289))]
ROOM_FOR_TWO = 2 * 4 * 58 * (128 * 4 + 8)  # of the largest: 58 rows in each of 4 layers
BUSY = [(key, place) for key in (None, *adapters()) for place in range(len(PROMPTS))]


@asynccontextmanager
async def engine_of(dtype: torch.dtype, **changes: Any) -> AsyncIterator[Engine]:
    model = copy.deepcopy(base()).to(DEVICE, dtype)
    options = {"slot_bytes": 2**24, "cache_tokens": 4096, "max_batch_tokens": 256, **changes}
    engine = Engine(model, tokenizer(), adapters().__getitem__, **options)
    engine.start()
    try:
        yield engine
    finally:
        await asyncio.to_thread(engine.stop, 5.0)


@cache
def merged_on_device(key: AdapterKey | None) -> PreTrainedModel:
    """In fp32, as what is served is held against it whatever the base's dtype."""
    return merged(key).to(DEVICE)


@cache
def expected(key: AdapterKey | None, place: int) -> list[int]:
    """What transformers' own generate says, greedily and past any end token."""
    ids = torch.tensor([PROMPTS[place]], device=DEVICE)
    greedy = GenerationConfig(
        max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    said = merged_on_device(key).generate(
        ids, attention_mask=torch.ones_like(ids), generation_config=greedy
    )
    return said[0, ids.shape[1] :].tolist()


async def play(engine: Engine, asked: list[tuple[AdapterKey | None, int]], name: str) -> list[Any]:
    """Send all at once; return the tokens of each."""
    each = [
        tokens(engine, request(f"{name}-{i}", PROMPTS[place], key, max_tokens=NUM_TOKENS))
        for i, (key, place) in enumerate(asked)
    ]
    return await asyncio.wait_for(asyncio.gather(*each), 120)


def test_a_mix_in_fp32_gets_the_merged_models_tokens() -> None:
    async def serve() -> list[Any]:
        async with engine_of(torch.float32) as engine:
            assert engine._slots.rows.device.type == DEVICE
            return await play(engine, BUSY, "mix")

    served = asyncio.run(serve())
    assert served == [expected(*one) for one in BUSY]
    assert len({tuple(answer) for answer in served}) > len(adapters())


def test_adapters_that_come_and_go_change_no_token() -> None:
    async def serve() -> None:
        async with engine_of(torch.float32, slot_bytes=ROOM_FOR_TWO) as engine:
            copy_in = engine._slots.copy_in

            def count(slot: Slot, adapter: Adapter) -> None:
                came.append(slot.key)
                copy_in(slot, adapter)

            engine._slots.copy_in = count  # type: ignore[method-assign]
            for number in range(2):
                assert await play(engine, BUSY, f"{number}") == [expected(*one) for one in BUSY]

    came: list[AdapterKey] = []
    asyncio.run(serve())
    assert set(came) == set(adapters())
    assert len(came) > len(adapters())  # some twice


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_logprobs_of_what_is_generated_are_the_merged_models(dtype: torch.dtype) -> None:
    async def one(engine: Engine, key: AdapterKey | None, place: int) -> list[TokenOutput]:
        asked = request(f"{key}-{place}", PROMPTS[place], key, max_tokens=NUM_TOKENS, logprobs=3)
        return [output async for output in engine.generate(asked)]

    async def serve() -> list[list[TokenOutput]]:
        async with engine_of(dtype) as engine:
            each = (one(engine, key, place) for key, place in BUSY)
            return await asyncio.wait_for(asyncio.gather(*each), 120)

    off: dict[AdapterKey | None, dict[AdapterKey | None, list[Tensor]]] = {}
    for (key, place), outputs in zip(BUSY, asyncio.run(serve()), strict=True):
        prompt, chosen = PROMPTS[place], [output.token_id for output in outputs]
        ids = torch.tensor([[*prompt, *chosen]], device=DEVICE)
        got = torch.tensor([output.logprob for output in outputs], device=DEVICE)
        assert all(len(output.top_logprobs) == 3 for output in outputs)
        for other in (None, *adapters()):
            with torch.no_grad():
                logits = merged_on_device(other)(ids).logits[0, len(prompt) - 1 : -1]
            wanted = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
            off.setdefault(key, {}).setdefault(other, []).append((got - wanted).abs())
    for key, by_model in off.items():
        mean = {other: float(torch.cat(found).mean()) for other, found in by_model.items()}
        assert min(mean, key=lambda other: mean[other]) == key
        assert mean[key] < (1e-4 if dtype == torch.float32 else 0.1)
        assert float(torch.cat(by_model[key]).max()) < (1e-3 if dtype == torch.float32 else 0.6)


def test_scores_beside_running_requests_are_the_merged_models() -> None:
    keys = [None, *list(adapters())[2:5]]
    ids = torch.tensor([PROMPTS[3]], device=DEVICE)

    async def serve() -> list[list[float]]:
        async with engine_of(torch.float32) as engine:
            beside = asyncio.create_task(play(engine, BUSY, "beside"))
            scored = await asyncio.gather(*(engine.score(PROMPTS[3], key, 2) for key in keys))
            assert await beside == [expected(*one) for one in BUSY]
        return [[token.logprob or 0.0 for token in row[1:]] for row in scored]

    for key, got in zip(keys, asyncio.run(serve()), strict=True):
        with torch.no_grad():
            logprobs = merged_on_device(key)(ids).logits[0, :-1].log_softmax(-1)
        wanted = logprobs.gather(1, ids[0, 1:, None])[:, 0].cpu()
        torch.testing.assert_close(torch.tensor(got), wanted, atol=1e-3, rtol=1e-3)


def test_draws_depend_on_the_seed_alone() -> None:
    key = next(iter(adapters()))

    async def serve() -> list[list[int]]:
        async with engine_of(torch.float32) as engine:

            def drawn(name: str, seed: int, **params: Any) -> asyncio.Task[list[int]]:
                asked = request(
                    name, PROMPTS[0], key, temperature=1.0, seed=seed, max_tokens=20, **params
                )
                return asyncio.create_task(tokens(engine, asked))

            alone = await drawn("alone", 7, top_p=0.9)
            crowd = [drawn(f"{i}", i, top_k=(0, 40)[i % 2], top_p=0.9) for i in range(6)]
            again = await drawn("again", 7, top_p=0.9)
            return [alone, again, *await asyncio.gather(*crowd)]

    alone, again, *crowd = asyncio.run(serve())
    assert alone == again
    assert alone not in crowd


def test_a_dedicated_adapter_is_switched_in_and_the_base_comes_back_bitwise() -> None:
    hot, other = list(adapters())[3], next(iter(adapters()))

    async def serve() -> None:
        async with engine_of(torch.float32) as engine:
            before = {name: value.clone() for name, value in engine._model.state_dict().items()}
            await engine.dedicate(hot)
            mine = [(hot, place) for place in range(len(PROMPTS))]
            assert await play(engine, mine, "hot") == [expected(*one) for one in mine]
            with pytest.raises(ServingError, match="dedicated to"):
                await tokens(engine, request("refused", PROMPTS[0], other))
            await engine.end_dedication()
            after = engine._model.state_dict()
            assert all(torch.equal(value, after[name]) for name, value in before.items())
            assert await play(engine, BUSY, "late") == [expected(*one) for one in BUSY]

    asyncio.run(serve())
