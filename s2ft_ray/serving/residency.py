"""Who is on the device, and who waits for a place there.

An adapter that is on the device is used at once. One that isn't waits its turn: tenants take turns,
and within a tenant the first comes first. Where those in use leave no room, the ones that have been
there longest are drained: they take no new users, so that the one that waits gets its place when
their running requests end. Invariants: nobody waits for more than the requests that run now and
those of the adapters ahead of it; one that waits is held by the store alone, within its bytes.
"""

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from s2ft_ray.errors import ServingError
from s2ft_ray.method import Adapter
from s2ft_ray.serving.adapter_store import AdapterStore
from s2ft_ray.serving.device_slots import DeviceSlots, Layout, Slot
from s2ft_ray.serving.engine_stats import AdapterEvents
from s2ft_ray.serving.requests import AdapterKey

# So long an adapter stays before it is drained for another: about what a load costs.
_SHORTEST_STAY_S = 0.25
_FILLS_AT_ONCE = 4


@dataclass(eq=False)
class _Waiting:
    """An adapter that waits for a place, and the requests that wait for it."""

    key: AdapterKey
    layout: Layout
    arrivals: list[asyncio.Future[Slot]] = field(default_factory=list)


class Residency:
    """Brings adapters to the device and takes them off it. Used from one event loop."""

    def __init__(
        self,
        slots: DeviceSlots,
        store: AdapterStore,
        prepare: Callable[[AdapterKey, Adapter], None],
        events: AdapterEvents,
    ) -> None:
        """`prepare` sees an adapter before its first use, and raises where it can't be served."""
        self.slots = slots
        self._prepare = prepare
        self._store = store
        self._waiting: dict[AdapterKey, _Waiting] = {}
        self._turns: OrderedDict[str | None, deque[_Waiting]] = OrderedDict()
        self._filling: dict[AdapterKey, asyncio.Task[None]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._events = events

    @property
    def num_waiting(self) -> int:
        """How many adapters wait for a place."""
        return len(self._waiting)

    async def acquire(self, key: AdapterKey, tenant: str | None = None) -> Slot:
        """Return the adapter's slot, in use until `release`. Raises what loading it raises."""
        if slot := self._ready(key):
            self._events.add(key, "hit")
            return self._use(slot)
        self._events.add(key, "miss")
        layout = await self._look_at(key)
        if slot := self._ready(key):  # another request brought it meanwhile
            return self._use(slot)
        waiting = self._waiting.get(key)
        if waiting is None:
            waiting = self._waiting[key] = _Waiting(key, layout)
            self._turns.setdefault(tenant, deque()).append(waiting)
        arrival: asyncio.Future[Slot] = asyncio.get_running_loop().create_future()
        waiting.arrivals.append(arrival)
        self._settle()
        try:
            return await arrival
        except asyncio.CancelledError:
            if arrival.done() and not arrival.cancelled() and not arrival.exception():
                self.release(arrival.result())
            self._settle()  # it may have been the first in line
            raise

    def release(self, slot: Slot) -> None:
        """End one use of a slot."""
        slot.num_users -= 1
        slot.last_used = time.monotonic()
        if not slot.num_users and slot.is_draining:
            self.slots.free(slot)
        self._settle()

    def drop(self, key: AdapterKey) -> None:
        """Take an adapter off the device and out of host memory, once nobody uses it."""
        self._store.forget(key)
        if slot := self.slots.find(key):
            slot.is_pinned = False
            slot.is_draining = True
            if not slot.num_users:
                self.slots.free(slot)
                self._settle()

    def _ready(self, key: AdapterKey) -> Slot | None:
        """Return the adapter's slot where it is filled and takes new users."""
        slot = self.slots.find(key)
        return slot if slot and not slot.is_draining and key not in self._waiting else None

    def _use(self, slot: Slot) -> Slot:
        slot.num_users += 1
        slot.last_used = time.monotonic()
        return slot

    async def _look_at(self, key: AdapterKey) -> Layout:
        """Return how an adapter lies among its rows, once it is seen that it can be served."""
        adapter = await self._store.get(key)
        self.slots.check_fits(key, adapter)
        self._prepare(key, adapter)
        return self.slots.layout_of(adapter)

    def _settle(self) -> None:
        """Give rows to those who wait, in their order, as far as there is room."""
        while (waiting := self._next()) and len(self._filling) < _FILLS_AT_ONCE:
            waiting.arrivals = [it for it in waiting.arrivals if not it.done()]
            if not waiting.arrivals:  # nobody wants it any more
                self._leave(waiting)
                del self._waiting[waiting.key]
                continue
            old = self.slots.find(waiting.key)
            if old and not old.num_users:
                self.slots.free(old)
                old = None
            slot = None if old else self.slots.allocate(waiting.key, waiting.layout)
            if slot is not None:
                self._leave(waiting)
                slot.num_users += 1  # nobody takes its rows while they are filled
                self._filling[waiting.key] = asyncio.create_task(self._fill(slot, waiting))
            elif any(slot.num_users and not slot.is_pinned for slot in self.slots):
                self._drain_for(waiting)
                return
            else:
                self._leave(waiting)
                self._end(waiting, ServingError(f"{waiting.key}: pinned adapters leave no room"))

    async def _fill(self, slot: Slot, waiting: _Waiting) -> None:
        """Bring the adapter into its slot and give the slot to those who wait for it."""
        try:
            await self._copy(slot, waiting.key)
        except Exception as error:  # noqa: BLE001 - told to those who wait
            slot.is_draining = True
            self._end(waiting, error)
        else:
            self._end(waiting, slot)
        del self._filling[waiting.key]
        self.release(slot)

    async def _copy(self, slot: Slot, key: AdapterKey) -> None:
        adapter = await self._store.get(key)  # it may have had to leave host memory meanwhile
        try:
            await asyncio.to_thread(self.slots.copy_in, slot, adapter)
        except (RuntimeError, MemoryError) as error:  # of the device, and of its memory
            raise ServingError(f"{key}: can't be loaded: {error}") from error

    def _end(self, waiting: _Waiting, outcome: Slot | Exception) -> None:
        """Give those who wait for an adapter its slot, or let them know that it doesn't come."""
        del self._waiting[waiting.key]
        for arrival in waiting.arrivals:
            if arrival.done():
                continue
            if isinstance(outcome, Slot):
                arrival.set_result(self._use(outcome))
            else:
                arrival.set_exception(outcome)

    def _next(self) -> _Waiting | None:
        """Return the first one of the tenant whose turn it is."""
        for line in self._turns.values():
            return line[0]
        return None

    def _leave(self, waiting: _Waiting) -> None:
        """Take one out of the line; its tenant's next turn is after everybody's."""
        tenant, line = next((t, line) for t, line in self._turns.items() if line[0] is waiting)
        line.popleft()
        self._turns.move_to_end(tenant)
        if not line:
            del self._turns[tenant]

    def _drain_for(self, waiting: _Waiting) -> None:
        """Let no more users to those that have been here longest, until there will be room."""
        needed = waiting.layout.num_rows
        in_use = [slot for slot in self.slots if slot.num_users and not slot.is_pinned]
        freed = sum(slot.length for slot in in_use if slot.is_draining)
        now = time.monotonic()
        for slot in sorted(in_use, key=lambda slot: slot.since):
            if freed >= needed:
                return
            if slot.is_draining:
                continue
            if (left_s := slot.since + _SHORTEST_STAY_S - now) > 0:
                self._look_again(left_s)
                return
            slot.is_draining = True
            freed += slot.length

    def _look_again(self, after_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(after_s, self._settle)
