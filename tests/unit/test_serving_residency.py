import asyncio
import random
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from s2ft_ray.config import S2FTConfig
from s2ft_ray.errors import AdapterError, ServingError
from s2ft_ray.method import Adapter, AdapterSlice, BaseInfo
from s2ft_ray.serving import residency as residency_module
from s2ft_ray.serving.adapter_store import AdapterStore
from s2ft_ray.serving.device_slots import DeviceSlots, Slot
from s2ft_ray.serving.engine_stats import AdapterEvents
from s2ft_ray.serving.requests import AdapterKey
from s2ft_ray.serving.residency import Residency

WIDTH = 8
ROW_BYTES = WIDTH * 4 + 8


def make_adapter(number: int, num_rows: int = 4, base: str = "b") -> Adapter:
    """One input-side and one output-side slice; every value of it is its number."""
    half = num_rows // 2
    slices = {
        "down": AdapterSlice(
            "in", torch.arange(half).int(), torch.full((WIDTH, half), 1.0 * number)
        ),
        "up": AdapterSlice(
            "out",
            torch.arange(num_rows - half).int(),
            torch.full((num_rows - half, WIDTH), 1.0 * number),
        ),
    }
    return Adapter(slices, BaseInfo("base", None, base), S2FTConfig())


class World:
    """Adapters by key, a store that counts its loads, and slots for `num_rows` rows."""

    def __init__(
        self, num_rows: int, host_bytes: int = 10**6, sizes: list[int] | None = None
    ) -> None:
        self.adapters = {}
        for number, size in enumerate(sizes or [4] * 12):
            adapter = make_adapter(number, size)
            self.adapters[AdapterKey(f"t.a{number}", "1", adapter.fingerprint)] = adapter
        self.keys = list(self.adapters)
        self.loaded: list[AdapterKey] = []
        self.load_s = 0.0
        self.events = AdapterEvents()
        self.slots = DeviceSlots(
            WIDTH, torch.float32, torch.device("cpu"), num_rows * ROW_BYTES, self.events
        )
        self.store = AdapterStore(self._load, "b", host_bytes, self.events)
        self.residency = Residency(self.slots, self.store, lambda _key, _adapter: None, self.events)

    def _load(self, key: AdapterKey) -> Adapter:
        self.loaded.append(key)
        time.sleep(self.load_s)
        return self.adapters[key]

    def assert_holds(self, slot: Slot) -> None:
        """The slot's rows are those of its adapter."""
        rows = self.slots.rows[slot.start : slot.start + slot.length]
        assert torch.all(rows == self.keys.index(slot.key)), slot.key


@pytest.fixture(autouse=True)
def _no_shortest_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency_module, "_SHORTEST_STAY_S", 0.0)


def allocate(world: World, number: int) -> Slot | None:
    key = world.keys[number]
    return world.slots.allocate(key, world.slots.layout_of(world.adapters[key]))


def test_slots_hold_as_many_rows_as_their_bytes_and_count_what_is_used() -> None:
    world = World(num_rows=10)
    assert world.slots.size_bytes == 10 * ROW_BYTES
    assert allocate(world, 0)
    assert allocate(world, 1)
    assert world.slots.used_bytes == 8 * ROW_BYTES


def test_slots_in_use_or_pinned_are_never_given_away() -> None:
    world = World(num_rows=8)
    used, pinned = allocate(world, 0), allocate(world, 1)
    assert used
    assert pinned
    used.num_users, pinned.is_pinned = 1, True
    assert allocate(world, 2) is None
    assert {slot.key for slot in world.slots} == {used.key, pinned.key}


def test_the_least_recently_used_slot_is_evicted_first_and_no_more_than_needed() -> None:
    world = World(num_rows=12)
    slots = [allocate(world, number) for number in range(3)]
    for slot, last_used in zip(slots, [3.0, 1.0, 2.0], strict=True):
        assert slot
        slot.last_used = last_used
    assert allocate(world, 3)
    assert [world.keys.index(slot.key) for slot in world.slots] == [0, 2, 3]


def test_a_slot_that_was_in_nobodys_way_survives_an_eviction() -> None:
    world = World(num_rows=12, sizes=[2, 4, 4, 6])  # rows 0-2, 2-6, 6-10 and two free ones
    for number, last_used in enumerate([0.0, 2.0, 1.0]):
        slot = allocate(world, number)
        assert slot
        slot.last_used = last_used
    big = allocate(world, 3)
    assert big
    assert (big.start, big.length) == (6, 6)
    assert world.slots.find(world.keys[0])


def test_slots_refuse_what_could_never_fit_and_say_why() -> None:
    world = World(num_rows=4)
    key = world.keys[0]
    with pytest.raises(AdapterError, match="more slot bytes"):
        world.slots.check_fits(key, make_adapter(1, num_rows=6))
    wide = AdapterSlice("in", torch.arange(1).int(), torch.zeros(WIDTH + 1, 1))
    with pytest.raises(AdapterError, match="rows of 9 values, the slots hold 8"):
        world.slots.check_fits(key, Adapter({"o": wide}, BaseInfo(None, None, "b"), S2FTConfig()))
    experts = AdapterSlice("in", torch.zeros(2, 1).int(), torch.zeros(2, WIDTH, 1))
    with pytest.raises(AdapterError, match="experts"):
        world.slots.check_fits(
            key, Adapter({"e": experts}, BaseInfo(None, None, "b"), S2FTConfig())
        )


def test_many_who_ask_for_one_adapter_cause_one_load() -> None:
    async def scenario() -> None:
        world = World(num_rows=8)
        world.load_s = 0.05
        slots = await asyncio.gather(*(world.residency.acquire(world.keys[0]) for _ in range(20)))
        assert len(world.loaded) == 1
        assert len(set(map(id, slots))) == 1
        assert slots[0].num_users == 20
        world.assert_holds(slots[0])

    asyncio.run(scenario())


def test_a_request_that_goes_away_does_not_end_the_load_of_the_others() -> None:
    async def scenario() -> None:
        world = World(num_rows=8)
        world.load_s = 0.05
        first = asyncio.create_task(world.residency.acquire(world.keys[0]))
        second = asyncio.create_task(world.residency.acquire(world.keys[0]))
        await asyncio.sleep(0.01)
        first.cancel()
        slot = await second
        assert slot.num_users == 1
        assert len(world.loaded) == 1

    asyncio.run(scenario())


def test_a_load_delays_no_other_adapter() -> None:
    async def scenario() -> None:
        world = World(num_rows=8)
        world.residency.release(await world.residency.acquire(world.keys[1]))
        world.load_s = 0.3
        slow = asyncio.create_task(world.residency.acquire(world.keys[0]))
        await asyncio.sleep(0.01)
        world.residency.release(await world.residency.acquire(world.keys[1]))
        assert not slow.done()
        await slow

    asyncio.run(scenario())


def test_the_store_stays_within_its_bytes_and_forgets_the_least_recently_used() -> None:
    async def scenario() -> None:
        size = 4 * (WIDTH * 4 + 4)
        world = World(num_rows=8, host_bytes=2 * size)
        for number in (0, 1, 0, 2):
            await world.store.get(world.keys[number])
        assert world.store.used_bytes == 2 * size
        assert list(world.store.sizes()) == [world.keys[0], world.keys[2]]
        world.store.forget(world.keys[0])
        assert world.store.used_bytes == size
        small = World(num_rows=8, host_bytes=size - 1)
        assert await small.store.get(small.keys[0])
        assert small.store.used_bytes == 0

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("given", "message"),
    [(make_adapter(7), "the registry names"), (make_adapter(0, base="c"), "is of base")],
)
def test_the_store_refuses_another_adapter_and_another_base(given: Adapter, message: str) -> None:
    expected = make_adapter(0) if message == "the registry names" else given
    key = AdapterKey("t.a", "1", expected.fingerprint)
    store = AdapterStore(lambda _: given, "b", 10**6, AdapterEvents())
    with pytest.raises(AdapterError, match=message):
        asyncio.run(store.get(key))
    assert store.used_bytes == 0


def test_what_loading_raises_reaches_every_request_and_the_next_one_tries_again() -> None:
    async def scenario() -> None:
        world = World(num_rows=8)
        world.adapters[world.keys[1]] = make_adapter(9)
        asked = [world.residency.acquire(world.keys[1]) for _ in range(3)]
        results = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(result) for result in results] == [AdapterError] * 3
        assert world.residency.num_waiting == 0
        world.adapters[world.keys[1]] = make_adapter(1)
        assert await world.residency.acquire(world.keys[1])

    asyncio.run(scenario())


def test_running_out_of_memory_while_filling_a_slot_is_told_and_leaks_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        world = World(num_rows=4)

        def fail(_slot: Slot, _adapter: Adapter) -> None:
            raise torch.OutOfMemoryError("no memory")

        with monkeypatch.context() as patch:
            patch.setattr(world.slots, "copy_in", fail)
            with pytest.raises(ServingError, match="can't be loaded: no memory"):
                await world.residency.acquire(world.keys[0])
        assert world.slots.used_bytes == 0
        world.assert_holds(await world.residency.acquire(world.keys[1]))

    asyncio.run(scenario())


def test_an_adapter_for_which_pins_leave_no_room_is_refused() -> None:
    async def scenario() -> None:
        world = World(num_rows=4)
        slot = await world.residency.acquire(world.keys[0])
        slot.is_pinned = True
        with pytest.raises(ServingError, match="pinned adapters leave no room"):
            await world.residency.acquire(world.keys[1])
        world.residency.release(slot)
        assert world.slots.find(world.keys[0]) is slot

    asyncio.run(scenario())


def test_a_draining_adapter_takes_no_new_users_until_those_ahead_had_their_turn() -> None:
    async def scenario() -> None:
        world = World(num_rows=4)
        one, two = world.keys[:2]
        order: list[str] = []

        async def use(name: str, key: AdapterKey) -> None:
            slot = await world.residency.acquire(key)
            order.append(name)
            world.assert_holds(slot)
            await go_on.wait()
            world.residency.release(slot)

        go_on = asyncio.Event()
        running = asyncio.create_task(use("one", one))
        while not order:
            await asyncio.sleep(0.001)
        waiting = asyncio.create_task(use("two", two))
        while not (slot := world.slots.find(one)) or not slot.is_draining:
            await asyncio.sleep(0.001)
        late = asyncio.create_task(use("one again", one))
        await asyncio.sleep(0)
        go_on.set()
        await asyncio.gather(running, waiting, late)
        assert order == ["one", "two", "one again"]

    asyncio.run(scenario())


def test_tenants_take_turns_for_a_place() -> None:
    async def scenario() -> None:
        world = World(num_rows=4)
        order: list[str] = []
        first = await world.residency.acquire(world.keys[0])

        async def use(tenant: str, number: int) -> None:
            slot = await world.residency.acquire(world.keys[number], tenant)
            order.append(tenant)
            world.residency.release(slot)

        greedy = [asyncio.create_task(use("greedy", number)) for number in range(1, 7)]
        await asyncio.sleep(0.02)
        modest = asyncio.create_task(use("modest", 7))
        await asyncio.sleep(0.02)
        world.residency.release(first)
        await asyncio.gather(modest, *greedy)
        assert order.index("modest") <= 1

    asyncio.run(scenario())


def test_waiters_that_are_cancelled_hold_nothing_up_and_leak_nothing() -> None:
    async def scenario() -> None:
        world = World(num_rows=4)
        slot = await world.residency.acquire(world.keys[0])
        gone = [asyncio.create_task(world.residency.acquire(key)) for key in world.keys[1:5]]
        stays = asyncio.create_task(world.residency.acquire(world.keys[5]))
        await asyncio.sleep(0.02)
        for task in gone:
            task.cancel()
        await asyncio.gather(*gone, return_exceptions=True)
        world.residency.release(slot)
        world.residency.release(await asyncio.wait_for(stays, 1.0))
        assert world.residency.num_waiting == 0
        assert all(slot.num_users == 0 for slot in world.slots)

    asyncio.run(scenario())


def test_a_dropped_adapter_leaves_when_its_last_request_ends() -> None:
    async def scenario() -> None:
        world = World(num_rows=8)
        slot = await world.residency.acquire(world.keys[0])
        world.residency.drop(world.keys[0])
        assert world.slots.find(world.keys[0]) is slot
        world.assert_holds(slot)
        world.residency.release(slot)
        assert world.slots.find(world.keys[0]) is None
        assert world.store.used_bytes == 0
        world.residency.drop(world.keys[3])  # was never here

    asyncio.run(scenario())


@pytest.mark.parametrize("seed", range(6))
def test_any_demand_beyond_the_slots_is_served_in_bounded_time(seed: int) -> None:
    """Six times more adapters than fit, of several sizes, cancelled at random; rows stay whole."""

    async def scenario() -> None:
        draw = random.Random(seed)
        world = World(num_rows=8, host_bytes=600, sizes=[2, 4, 6, 4, 8, 2, 4, 4, 2, 6, 4, 2])
        served: list[AdapterKey] = []

        async def use(key: AdapterKey, tenant: str, hold_s: float) -> None:
            slot = await world.residency.acquire(key, tenant)
            try:
                assert slot.key == key
                for _ in range(3):
                    world.assert_holds(slot)
                    await asyncio.sleep(hold_s / 3)
                served.append(key)
            finally:
                world.residency.release(slot)

        tasks = []
        for _ in range(120):
            hold_s = draw.random() * 0.003
            work = use(draw.choice(world.keys), draw.choice("abc"), hold_s)
            tasks.append(asyncio.create_task(work))
            if draw.random() < 0.3:
                await asyncio.sleep(draw.random() * 0.002)
        doomed = draw.sample(tasks, 20)
        for task in doomed:
            task.cancel()
        async with asyncio.timeout(10):
            results = await asyncio.gather(*tasks, return_exceptions=True)
        faults = [it for it in results if isinstance(it, Exception)]
        assert faults == []
        assert len(served) >= 100
        assert world.residency.num_waiting == 0
        assert all(slot.num_users == 0 for slot in world.slots)

    asyncio.run(scenario())


def test_adapters_that_wait_are_in_host_memory_within_its_bytes_and_are_served_in_the_end() -> None:
    async def scenario() -> None:
        num_adapters, budget = 60, 2
        size = 4 * (WIDTH * 4 + 4)
        world = World(num_rows=4, host_bytes=budget * size, sizes=[4] * num_adapters)
        world.adapters.clear()
        live: weakref.WeakSet[Adapter] = weakref.WeakSet()

        def load(key: AdapterKey) -> Adapter:
            adapter = make_adapter(world.keys.index(key))
            live.add(adapter)
            return adapter

        store = AdapterStore(load, "b", budget * size, world.events)
        world.residency = Residency(world.slots, store, lambda _key, _adapter: None, world.events)

        async def use(key: AdapterKey) -> None:
            slot = await world.residency.acquire(key)
            world.assert_holds(slot)
            world.residency.release(slot)

        first = await world.residency.acquire(world.keys[0])
        waiting = [asyncio.create_task(use(key)) for key in world.keys[1:]]
        async with asyncio.timeout(10):
            while world.residency.num_waiting < num_adapters - 1 or len(live) > budget:
                await asyncio.sleep(0.001)
        world.residency.release(first)
        most = 0
        while not all(task.done() for task in waiting):
            most = max(most, len(live))
            await asyncio.sleep(0)
        assert most <= budget + 4
        await asyncio.gather(*waiting)

    asyncio.run(scenario())


def test_an_adapter_whose_files_have_gone_while_it_waited_is_told_and_holds_up_nobody() -> None:
    async def scenario() -> None:
        world = World(num_rows=4, host_bytes=0)
        slot = await world.residency.acquire(world.keys[0])
        gone = asyncio.create_task(world.residency.acquire(world.keys[1]))
        while world.residency.num_waiting < 1:
            await asyncio.sleep(0.001)
        other = asyncio.create_task(world.residency.acquire(world.keys[2]))
        while world.residency.num_waiting < 2:
            await asyncio.sleep(0.001)
        world.adapters[world.keys[1]] = make_adapter(9)
        world.residency.release(slot)
        async with asyncio.timeout(5):
            with pytest.raises(AdapterError, match="the registry names"):
                await gone
            world.assert_holds(await other)

    asyncio.run(scenario())


def test_filling_a_slot_leaves_the_event_loop_free(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        world = World(num_rows=8)
        copy_in: Callable[[Slot, Adapter], None] = world.slots.copy_in
        threads = set()

        def watched(slot: Slot, adapter: Adapter) -> None:
            threads.add(threading.current_thread())
            copy_in(slot, adapter)

        monkeypatch.setattr(world.slots, "copy_in", watched)
        await world.residency.acquire(world.keys[0])
        assert threading.current_thread() not in threads

    asyncio.run(scenario())


def test_loads_that_hang_keep_nobody_from_other_threads() -> None:
    go_on = threading.Event()

    def hang(_key: AdapterKey) -> Adapter:
        go_on.wait(20)
        return make_adapter(0)

    async def ask() -> int:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        store = AdapterStore(hang, "b", 10**6, AdapterEvents())
        loads = [
            asyncio.create_task(store.get(AdapterKey(f"t.{i}", "1", make_adapter(0).fingerprint)))
            for i in range(8)
        ]
        await asyncio.sleep(0)
        told = await asyncio.wait_for(asyncio.to_thread(lambda: 7), 10)
        go_on.set()
        await asyncio.gather(*loads)
        return told

    assert asyncio.run(ask()) == 7


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory")])
def test_a_load_without_memory_is_no_fault_of_the_request(error: Exception) -> None:
    def fail(_key: AdapterKey) -> Adapter:
        raise error

    store = AdapterStore(fail, "b", 10**6, AdapterEvents())
    with pytest.raises(ServingError, match=r"t\.a:1: can't be loaded: .*memory"):
        asyncio.run(store.get(AdapterKey("t.a", "1", "f")))
