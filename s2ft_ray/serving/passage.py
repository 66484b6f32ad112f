"""A door that everybody goes through, and that can be closed until nobody is inside.

Invariant: while it is closed nobody is inside but who closed it. Used from one event loop.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Passage:
    """Lets any number in at once, or one alone."""

    def __init__(self) -> None:
        self._is_open = asyncio.Event()
        self._is_open.set()
        self._is_empty = asyncio.Event()
        self._is_empty.set()
        self._alone = asyncio.Lock()
        self._num_inside = 0

    @asynccontextmanager
    async def inside(self) -> AsyncIterator[None]:
        """Be inside; wait for it while the door is closed."""
        while not self._is_open.is_set():
            await self._is_open.wait()
        self._num_inside += 1
        self._is_empty.clear()
        try:
            yield
        finally:
            self._num_inside -= 1
            if not self._num_inside:
                self._is_empty.set()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Let nobody in any more, wait until all are out, and open again afterwards."""
        async with self._alone:
            self._is_open.clear()
            try:
                await self._is_empty.wait()
                yield
            finally:
                self._is_open.set()
