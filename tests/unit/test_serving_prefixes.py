"""Shared pages of the KV cache: found by who filled them alone, and of no effect on any token."""

import asyncio
from dataclasses import replace

import pytest
from serving_worlds import adapters, request, running_engine, tokens

from s2ft_ray.serving.engine import Engine
from s2ft_ray.serving.requests import AdapterKey, GenerationRequest

PAGE = 16  # of `running_engine`
SYSTEM = tuple(1 + (37 * i) % 700 for i in range(5 * PAGE))
FIRST, SECOND, *_ = adapters()


def ask(name: str, key: AdapterKey | None, tenant: str = "acme", end: int = 9) -> GenerationRequest:
    asked = request(name, (*SYSTEM, end), key, max_tokens=6)
    return replace(asked, tenant=tenant)


async def shared(engine: Engine, asked: GenerationRequest) -> tuple[list[int], int]:
    """Return a request's tokens, and how many of its prompt it found in the cache."""
    before = engine.stats().num_shared_tokens
    answer = await tokens(engine, asked)
    return answer, engine.stats().num_shared_tokens - before


def test_a_prompt_that_begins_like_another_computes_only_the_rest() -> None:
    async def play() -> None:
        async with running_engine() as engine:
            assert (await shared(engine, ask("a", FIRST)))[1] == 0
            assert (await shared(engine, ask("b", FIRST, end=10)))[1] == len(SYSTEM)

    asyncio.run(play())


@pytest.mark.parametrize(
    ("key", "tenant"),
    [(SECOND, "acme"), (None, "acme"), (FIRST, "globex"), (replace(FIRST, version="2"), "acme")],
    ids=["another adapter", "the base", "another tenant", "another version"],
)
def test_nobody_else_finds_its_pages(key: AdapterKey | None, tenant: str) -> None:
    # the other version has the same deltas, so that only its name keeps them apart
    everything = {**adapters(), replace(FIRST, version="2"): adapters()[FIRST]}

    async def play() -> None:
        async with running_engine(everything.__getitem__) as engine:
            await tokens(engine, ask("a", FIRST))
            answer, found = await shared(engine, ask("b", key, tenant))
            assert found == 0
            assert (await shared(engine, ask("c", key, tenant)))[1] == len(SYSTEM)
        async with running_engine(everything.__getitem__, share_prefixes=False) as engine:
            assert await shared(engine, ask("b", key, tenant)) == (answer, 0)

    asyncio.run(play())


def test_eviction_and_a_dedicated_engine_change_no_token() -> None:
    async def play() -> None:
        async with running_engine() as engine:
            wanted = {key: await tokens(engine, ask("a", key)) for key in (None, FIRST)}
            engine.drop(FIRST)
            assert await shared(engine, ask("b", FIRST)) == (wanted[FIRST], len(SYSTEM))
            await engine.dedicate(FIRST)
            assert await shared(engine, ask("c", FIRST)) == (wanted[FIRST], 0)
            await engine.end_dedication()
            assert await shared(engine, ask("d", None)) == (wanted[None], len(SYSTEM))

    asyncio.run(play())


def test_shared_pages_give_way_to_a_request_that_needs_the_room() -> None:
    async def play() -> None:
        async with running_engine(cache_tokens=192) as engine:
            await tokens(engine, ask("a", FIRST))
            long = request("long", tuple(range(1, 180)), max_tokens=4)
            assert len(await asyncio.wait_for(tokens(engine, long), 30)) == 4
            assert (await shared(engine, ask("b", FIRST)))[1] == 0

    asyncio.run(play())
