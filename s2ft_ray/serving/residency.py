"""Who is on the device, and who waits for a place there.

An adapter that is on the device is used at once. One that isn't waits its turn: tenants take turns,
and within a tenant the first comes first. Where those in use leave no room, the ones that have been
there longest are drained: they take no new users, so that the one that waits gets its place when
their running requests end. Invariant: nobody waits for more than the requests that run now and
those of the adapters ahead of it.
"""

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from s2ft_ray.errors import ServingError
from s2ft_ray.method import Adapter
from s2ft_ray.serving.adapter_store import AdapterStore
from s2ft_ray.serving.device_slots import DeviceSlots, Slot
from s2ft_ray.serving.engine_stats import AdapterEvents
from s2ft_ray.serving.requests import AdapterKey

# So long an adapter stays before it is drained for another: about what a load costs.
_SHORTEST_STAY_S = 0.25


@dataclass(eq=False)
class _Waiting:
    """An adapter that waits for a place, and the requests that wait for it."""

    key: AdapterKey
    adapter: Adapter
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
        self._placing: asyncio.Task[None] | None = None
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
        adapter = await self._store.get(key)
        if slot := self._ready(key):  # another request brought it meanwhile
            return self._use(slot)
        self.slots.check_fits(key, adapter)
        self._prepare(key, adapter)
        waiting = self._waiting.get(key)
        if waiting is None:
            waiting = self._waiting[key] = _Waiting(key, adapter)
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

    def _settle(self) -> None:
        """See that somebody places those who wait."""
        if self._waiting and (self._placing is None or self._placing.done()):
            self._placing = asyncio.create_task(self._place_all())

    async def _place_all(self) -> None:
        while waiting := self._next():
            waiting.arrivals = [it for it in waiting.arrivals if not it.done()]
            if not waiting.arrivals:  # nobody wants it any more
                self._leave(waiting)
                continue
            old = self.slots.find(waiting.key)
            if old and not old.num_users:
                self.slots.free(old)
                old = None
            slot = None if old else self.slots.allocate(waiting.key, waiting.adapter)
            if slot is not None:
                await self._fill(slot, waiting)
            elif any(slot.num_users and not slot.is_pinned for slot in self.slots):
                self._drain_for(waiting)
                return
            else:
                self._refuse(waiting, ServingError(f"{waiting.key}: pinned adapters leave no room"))

    async def _fill(self, slot: Slot, waiting: _Waiting) -> None:
        """Bring the adapter into its slot and give the slot to those who wait for it."""
        slot.num_users += 1  # nobody takes its rows while they are filled
        try:
            await asyncio.to_thread(self.slots.copy_in, slot, waiting.adapter)
        except (RuntimeError, MemoryError) as error:  # of the device, and of its memory
            slot.num_users -= 1
            self.slots.free(slot)
            self._refuse(waiting, ServingError(f"{waiting.key}: can't be loaded: {error}"))
            return
        self._leave(waiting)
        for arrival in waiting.arrivals:
            if not arrival.done():
                arrival.set_result(self._use(slot))
        slot.num_users -= 1

    def _refuse(self, waiting: _Waiting, error: ServingError) -> None:
        """Let those who wait for an adapter know that it doesn't come."""
        self._leave(waiting)
        for arrival in waiting.arrivals:
            if not arrival.done():
                arrival.set_exception(error)

    def _next(self) -> _Waiting | None:
        """Return the first one of the tenant whose turn it is."""
        for line in self._turns.values():
            return line[0]
        return None

    def _leave(self, waiting: _Waiting) -> None:
        """Take one out of the line; its tenant's next turn is after everybody's."""
        del self._waiting[waiting.key]
        tenant, line = next((t, line) for t, line in self._turns.items() if line[0] is waiting)
        line.popleft()
        self._turns.move_to_end(tenant)
        if not line:
            del self._turns[tenant]

    def _drain_for(self, waiting: _Waiting) -> None:
        """Let no more users to those that have been here longest, until there will be room."""
        needed = sum(part.count for part in waiting.adapter.slices.values())
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
