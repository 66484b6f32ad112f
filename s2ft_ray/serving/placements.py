"""How a replica keeps the adapters that the operator has placed: warm, pinned, or dedicated to one.

    warm       on the device from the start, evicted like any other
    pinned     on the device, never evicted
    dedicated  in the base's weights: it alone is served, at the base's own cost

A new version of an adapter that this replica holds is brought to the device before it is asked for.
Invariant: the catalog alone says what is placed, so that every replica, also one that starts
later, comes to hold the same.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

from s2ft_ray.errors import S2FTError, ServingError
from s2ft_ray.serving.catalog import Catalog
from s2ft_ray.serving.engine_stats import Resident
from s2ft_ray.serving.requests import AdapterKey
from s2ft_ray.serving.routes import Route

log = logging.getLogger("ray.serve")
_SETTLE_S = 30.0
"""After a version of the dedicated adapter gave way: requests of both may still be on their way."""


class Places(Protocol):
    """What is asked of an engine here."""

    @property
    def dedicated(self) -> AdapterKey | None:
        """The adapter in the base's weights."""

    def residents(self) -> list[Resident]:
        """Return the adapters in memory."""

    async def prewarm(self, key: AdapterKey) -> None:
        """Bring an adapter to the device."""

    async def pin(self, key: AdapterKey) -> None:
        """Bring an adapter to the device and keep it there."""

    def unpin(self, key: AdapterKey) -> None:
        """Let an adapter be evicted again."""

    async def dedicate(self, key: AdapterKey) -> None:
        """Switch an adapter into the base's weights."""

    async def end_dedication(self) -> None:
        """Put the base back."""


class Placements:
    """Brings one engine to what the catalog says."""

    def __init__(
        self,
        engine: Places,
        base_id: str,
        remember: Callable[[Route], None],
        checking: asyncio.Lock,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`remember` is told where an adapter's files are; whoever holds `checking` needs the
        base's own weights."""
        self._engine = engine
        self._base_id = base_id
        self._remember = remember
        self._checking = checking
        self._clock = clock
        self._gave_way_at = -_SETTLE_S
        self._kept: dict[AdapterKey, str] = {}
        self._live: dict[tuple[str, str], Route] = {}

    def placement_of(self, key: AdapterKey) -> str | None:
        """Return how an adapter is kept here; None: it comes and goes."""
        return "dedicated" if self._engine.dedicated == key else self._kept.get(key)

    async def follow(self, catalog: Catalog) -> None:
        """Take a catalog. What can't be done now is logged, and tried with the next one."""
        if not catalog.is_ready:  # of a watcher that was restarted
            return
        wanted = catalog.placed(self._base_id)
        for key in [key for key, how in self._kept.items() if wanted.get(key, ("", ""))[1] != how]:
            self._engine.unpin(key)
            del self._kept[key]
        dedicated = None
        for key, (route, placement) in wanted.items():
            self._remember(route)
            if placement == "dedicated":
                dedicated = key
            elif key not in self._kept:
                bring = self._engine.pin if placement == "pinned" else self._engine.prewarm
                if await _try(bring(key), f"{key} can't be {placement}"):
                    self._kept[key] = placement
        await self._warm_successors(catalog)
        await _try(self._dedicate(dedicated), f"{dedicated or 'the base'} can't be switched to")

    async def give_way(self, key: AdapterKey | None) -> None:
        """End a dedication to another version of the adapter that is asked for."""
        current = self._engine.dedicated
        if key is None or current is None or current == key or current.name != key.name:
            return
        self._gave_way_at = self._clock()
        await self._engine.end_dedication()

    async def _dedicate(self, wanted: AdapterKey | None) -> None:
        current = self._engine.dedicated
        if current == wanted:
            return
        async with self._checking:
            if current is not None:
                self._gave_way_at = self._clock()
                await self._engine.end_dedication()
                log.info("%s is out of the base's weights", current)
            if wanted is not None and self._clock() - self._gave_way_at >= _SETTLE_S:
                await self._engine.dedicate(wanted)
                log.info("%s is in the base's weights, and alone is served", wanted)

    async def _warm_successors(self, catalog: Catalog) -> None:
        """Bring the new versions of what is held here to the device."""
        live = {
            (name, alias): route
            for name, model in catalog.models.items()
            for alias, route in model.live.items()
            if route.base_id == self._base_id
        }
        held = {resident.key for resident in self._engine.residents()}
        for place, route in live.items():
            before = self._live.get(place)
            if before is None or before == route or before.adapter not in held:
                continue
            assert route.adapter is not None
            self._remember(route)
            await _try(self._engine.prewarm(route.adapter), f"{route.adapter} can't be warmed")
        self._live = live


async def _try(work: Awaitable[None], failure: str) -> bool:
    try:
        await work
    except S2FTError as error:
        log.warning("%s: %s", failure, error)
        return False
    return True


def check_undedicated(engine: Places, key: AdapterKey) -> None:
    """Raise ServingError where a version can't be checked: the base's own weights aren't there."""
    if engine.dedicated is not None:
        raise ServingError(f"{key}: its base is dedicated to {engine.dedicated} now")
