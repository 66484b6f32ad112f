"""What the operator has placed: pinned, warm and dedicated adapters on a real engine."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
from serving_fakes import BASE, make_catalog
from serving_worlds import adapters, request, running_engine, tokens

from s2ft_ray.errors import ServingError
from s2ft_ray.serving.catalog import Catalog, CatalogModel
from s2ft_ray.serving.engine import Engine
from s2ft_ray.serving.placements import Placements, check_undedicated
from s2ft_ray.serving.requests import AdapterKey
from s2ft_ray.serving.routes import Route

FIRST, SECOND, THIRD, *_ = adapters()
NEWER = replace(FIRST, version="2")
PROMPT = (1, 52, 83)
ROOM_FOR_TWO = 2 * 4 * 28 * (128 * 4 + 8)


def catalog(live: dict[AdapterKey, str | None]) -> Catalog:
    """A catalog of adapters, each the champion of its own model, by placement."""
    models = []
    for key, placement in live.items():
        placements = {} if placement is None else {"champion": placement}
        route = Route(BASE, key.fingerprint, key)
        models.append(CatalogModel(key.name, live={"champion": route}, placements=placements))
    return make_catalog(*models)


class World:
    """An engine whose adapters are placed, on a clock of the test's own."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.now = 0.0
        self.checking = asyncio.Lock()
        self.remembered: set[AdapterKey | None] = set()
        self.placements = Placements(
            engine, BASE, lambda r: self.remembered.add(r.adapter), self.checking, lambda: self.now
        )

    async def follow(self, live: dict[AdapterKey, str | None]) -> None:
        await self.placements.follow(catalog(live))

    async def ask(self, key: AdapterKey | None) -> list[int]:
        await self.placements.give_way(key)
        name = f"{key}-{self.engine.stats().num_steps}"
        return await tokens(self.engine, request(name, PROMPT, key, max_tokens=4))

    def on_device(self) -> set[AdapterKey]:
        return set(self.engine.stats().on_device)


def play(story: Callable[[World], Awaitable[None]], **sizes: int) -> None:
    everything = {**adapters(), NEWER: adapters()[FIRST]}

    async def run() -> None:
        async with running_engine(everything.__getitem__, **sizes) as engine:
            await story(World(engine))

    asyncio.run(run())


def test_a_pinned_adapter_stays_and_a_warm_one_may_go() -> None:
    async def story(world: World) -> None:
        await world.follow({FIRST: "pinned", SECOND: "warm"})
        assert world.on_device() == world.remembered == {FIRST, SECOND}
        assert world.placements.placement_of(FIRST) == "pinned"
        await world.ask(THIRD)
        assert world.on_device() == {FIRST, THIRD}
        assert world.engine.stats().num_evictions == 1
        await world.follow({FIRST: None, SECOND: "warm"})
        assert world.placements.placement_of(FIRST) is None
        await world.ask(SECOND)
        await world.ask(THIRD)
        assert world.on_device() == {SECOND, THIRD}

    play(story, slot_bytes=ROOM_FOR_TWO)


def test_the_new_version_of_what_is_held_is_there_before_it_is_asked_for() -> None:
    async def story(world: World) -> None:
        await world.follow({FIRST: None, SECOND: None})
        await world.ask(FIRST)
        await world.follow({NEWER: None, SECOND: None})
        assert world.on_device() == {FIRST, NEWER}

    play(story)


def test_a_dedicated_base_answers_for_one_and_gives_way_to_its_next_version() -> None:
    async def story(world: World) -> None:
        wanted = {key: await world.ask(key) for key in (None, FIRST, SECOND)}
        await world.follow({FIRST: "dedicated", SECOND: "dedicated"})
        assert world.engine.dedicated == FIRST
        assert world.placements.placement_of(SECOND) == "pinned"
        assert await world.ask(FIRST) == wanted[FIRST]
        for key in (None, SECOND):
            with pytest.raises(ServingError, match="dedicated to"):
                await world.ask(key)
        with pytest.raises(ServingError, match="dedicated to"):
            check_undedicated(world.engine, SECOND)
        # the next version: both are answered until nobody can still be on the way to the old one
        assert await world.ask(NEWER) == wanted[FIRST]
        await world.follow({NEWER: "dedicated"})
        assert world.engine.dedicated is None
        assert await world.ask(FIRST) == wanted[FIRST]
        world.now = 31.0
        await world.follow({NEWER: "dedicated"})
        assert world.engine.dedicated == NEWER
        await world.follow({NEWER: None})
        assert await world.ask(None) == wanted[None]

    play(story)


def test_a_watcher_that_knows_nothing_yet_changes_nothing() -> None:
    async def story(world: World) -> None:
        await world.follow({FIRST: "pinned"})
        await world.placements.follow(Catalog(("w2", 0)))
        assert world.placements.placement_of(FIRST) == "pinned"

    play(story)


def test_what_cant_be_placed_holds_up_nothing_and_is_tried_again() -> None:
    async def story(world: World) -> None:
        await world.follow({FIRST: "pinned", SECOND: "pinned", THIRD: "pinned"})
        assert len(world.on_device()) == 2
        await world.follow({FIRST: None, SECOND: "pinned", THIRD: "pinned"})
        assert world.on_device() == {SECOND, THIRD}

    play(story, slot_bytes=ROOM_FOR_TWO)
