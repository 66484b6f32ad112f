"""A thread that keeps trying: calls a delivery every so often, slower while it fails.

Invariant: what the delivery raises never reaches the training driver, and no call here waits
longer than its caller allowed. The first failure and the recovery are told, once each.
"""

import logging
import threading
import time
from collections.abc import Callable

from s2ft_ray.registry.connection import first_line

log = logging.getLogger(__name__)


class Courier:
    """Runs `deliver` in the background; `deliver` raises where it got stuck."""

    def __init__(
        self,
        deliver: Callable[[], object],
        destination: str,
        *,
        interval_s: float = 1.0,
        retry_s: tuple[float, float] = (1.0, 30.0),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._deliver = deliver
        self._destination = destination
        self._interval_s = interval_s
        self._retry_s = retry_s
        self._clock = clock
        self._failing_since: float | None = None
        self._failures = 0
        self._asked = 0  # passes asked for by flush
        self._tried = 0  # the last of them that a pass has tried to answer
        self._answered = 0  # and the last that one has answered
        self._ending = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="mlflow-delivery", daemon=True)

    def start(self) -> None:
        """Begin to deliver."""
        self._thread.start()

    def flush(self, timeout_s: float) -> bool:
        """Deliver what is owed now; False where that didn't succeed within `timeout_s`."""
        with self._changed:
            self._asked += 1
            wanted = self._asked
            self._changed.notify_all()
            return self._changed.wait_for(lambda: self._answered >= wanted, timeout_s)

    def stop(self, timeout_s: float) -> bool:
        """Flush, then end the thread; one that hangs in MLflow is left to die with the process."""
        deadline = self._clock() + timeout_s
        delivered = self.flush(timeout_s)
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        self._thread.join(max(0.0, deadline - self._clock()))
        return delivered

    def pass_once(self) -> float:
        """Make one pass and return how long to wait before the next."""
        with self._changed:
            asked = self._tried = self._asked
        try:
            self._deliver()
        except Exception as error:  # noqa: BLE001  a run must not end because its diary does
            return self._failed(error)
        self._succeeded()
        with self._changed:
            self._answered = asked
            self._changed.notify_all()
        return self._interval_s

    def _work(self) -> None:
        while True:
            pause_s = self.pass_once()
            with self._changed:
                if self._asked > self._answered:  # someone waits: don't sleep out a long pause
                    pause_s = min(pause_s, self._retry_s[0])
                self._changed.wait_for(lambda: self._ending or self._asked > self._tried, pause_s)
                if self._ending:
                    return

    def _failed(self, error: Exception) -> float:
        if self._failing_since is None:
            self._failing_since = self._clock()
            log.warning(
                "MLflow at %s takes nothing now (%s); training goes on, metrics wait in the run"
                " folder and are delivered later",
                self._destination,
                first_line(error),
            )
        log.debug("MLflow delivery failed", exc_info=error)
        first, longest = self._retry_s
        pause_s: float = min(longest, first * 2**self._failures)
        self._failures = min(self._failures + 1, 30)
        return pause_s

    def _succeeded(self) -> None:
        if self._failing_since is not None:
            away_s = self._clock() - self._failing_since
            log.warning(
                "MLflow at %s is back after %.0f s; everything is delivered",
                self._destination,
                away_s,
            )
        self._failing_since = None
        self._failures = 0
