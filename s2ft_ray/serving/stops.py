"""Stop texts in a text that comes in pieces.

Invariant: no character of a stop text, nor one that could still become part of it, goes out
before it is decided.
"""

from collections.abc import Sequence


class StopMatcher:
    """Cuts one answer at the first of its stop texts."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.is_stopped = False

    def push(self, text: str) -> str:
        """Return what is certain to be part of the answer; `is_stopped` tells of its end."""
        self._held += text
        found = [(self._held.find(stop), len(stop)) for stop in self._stops if stop in self._held]
        if found:
            self.is_stopped = True
            # the one that is whole first, so that it doesn't matter how the text was sliced
            place, _ = min(found, key=lambda found: (sum(found), found))
            return self._release(place, drop=True)
        return self._release(len(self._held) - self._undecided())

    def finish(self) -> str:
        """Return what was held back: nothing more comes that could make it a stop text."""
        return self._release(len(self._held))

    def _undecided(self) -> int:
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0

    def _release(self, length: int, drop: bool = False) -> str:
        released, self._held = self._held[:length], "" if drop else self._held[length:]
        return released
