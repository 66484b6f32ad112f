"""Adapters in host memory, by bytes; what isn't there is loaded, once however many ask."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from s2ft_ray.errors import AdapterError, S2FTError, ServingError
from s2ft_ray.method import Adapter
from s2ft_ray.serving.engine_stats import AdapterEvents
from s2ft_ray.serving.requests import AdapterKey

_LOADS_AT_ONCE = 4


class AdapterStore:
    """A least-recently-used cache before `load`. Used from one event loop."""

    def __init__(
        self,
        load: Callable[[AdapterKey], Adapter],
        base: str,
        size_bytes: int,
        events: AdapterEvents,
    ) -> None:
        """Keep up to `size_bytes` of adapters whose base has the fingerprint `base`.

        `load` runs in a thread and raises what the request that needs the adapter is told.
        """
        self._load = load
        self._base = base
        self._size_bytes = size_bytes
        self._kept: OrderedDict[AdapterKey, Adapter] = OrderedDict()
        self._sizes: dict[AdapterKey, int] = {}
        self._coming: dict[AdapterKey, asyncio.Task[Adapter]] = {}
        # threads of their own: loads that hang keep nobody from an adapter that is here already
        self._threads = ThreadPoolExecutor(_LOADS_AT_ONCE, thread_name_prefix="adapter-load")
        self._events = events
        self.used_bytes = 0

    async def get(self, key: AdapterKey) -> Adapter:
        """Return an adapter, loading it if need be.

        Raises AdapterError where what was loaded is another adapter, or of another base,
        ServingError where there is no memory for it.
        """
        if kept := self._kept.get(key):
            self._kept.move_to_end(key)
            return kept
        task = self._coming.get(key)
        if task is None:
            task = asyncio.create_task(self._fetch(key))
            task.add_done_callback(_look_at)
            self._coming[key] = task
        # one request that goes away doesn't end the load of the others
        return await asyncio.shield(task)

    def sizes(self) -> dict[AdapterKey, int]:
        """Return the bytes of each adapter that is kept."""
        return dict(self._sizes)

    def forget(self, key: AdapterKey) -> None:
        """Drop an adapter from host memory."""
        if self._kept.pop(key, None):
            self.used_bytes -= self._sizes.pop(key)

    def close(self) -> None:
        """End the loading threads, without waiting for what hangs."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _fetch(self, key: AdapterKey) -> Adapter:
        try:
            self._events.add(key, "load")
            loop = asyncio.get_running_loop()
            adapter = await loop.run_in_executor(self._threads, self._load, key)
        except S2FTError:
            raise
        except (RuntimeError, MemoryError) as error:  # torch's allocator raises the former
            raise ServingError(
                f"{key}: can't be loaded: {str(error) or 'out of memory'}"
            ) from error
        finally:
            del self._coming[key]
        if adapter.fingerprint != key.fingerprint:
            raise AdapterError(
                f"{key}: the files hold adapter {adapter.fingerprint[:12]}, the registry names"
                f" {key.fingerprint[:12]}"
            )
        if adapter.base.fingerprint != self._base:
            raise AdapterError(
                f"{key}: is of base {adapter.base.name} ({adapter.base.fingerprint[:12]}), served"
                f" here is {self._base[:12]}"
            )
        self._keep(key, adapter)
        return adapter

    def _keep(self, key: AdapterKey, adapter: Adapter) -> None:
        self._kept[key] = adapter
        self._sizes[key] = _size_bytes(adapter)
        self.used_bytes += self._sizes[key]
        while self.used_bytes > self._size_bytes:
            oldest, _ = self._kept.popitem(last=False)
            self.used_bytes -= self._sizes.pop(oldest)


def _look_at(task: asyncio.Task[Adapter]) -> None:
    """See a failure that all who asked for the adapter have left to nobody."""
    if not task.cancelled():
        task.exception()


def _size_bytes(adapter: Adapter) -> int:
    return sum(part.delta.nbytes + part.indices.nbytes for part in adapter.slices.values())
