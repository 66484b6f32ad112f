import logging
import threading
import time

import pytest

from s2ft_ray.registry.courier import Courier


class Backend:
    """A delivery that fails while it is down."""

    def __init__(self) -> None:
        self.down = True
        self.calls = 0

    def deliver(self) -> None:
        self.calls += 1
        if self.down:
            raise OSError("connection refused\nand a traceback")


def test_pauses_double_up_to_a_limit_and_start_anew_after_a_success() -> None:
    backend = Backend()
    courier = Courier(backend.deliver, "x", interval_s=0.5, retry_s=(1.0, 10.0))
    assert [courier.pass_once() for _ in range(6)] == [1.0, 2.0, 4.0, 8.0, 10.0, 10.0]
    backend.down = False
    assert courier.pass_once() == 0.5
    backend.down = True
    assert courier.pass_once() == 1.0


def test_an_outage_is_told_once_and_its_end_once(caplog: pytest.LogCaptureFixture) -> None:
    backend = Backend()
    now = iter([100.0, 172.0, 200.0])
    courier = Courier(backend.deliver, "http://host:1", clock=lambda: next(now))
    with caplog.at_level(logging.INFO):
        for _ in range(5):
            courier.pass_once()
        backend.down = False
        courier.pass_once()
        courier.pass_once()
    first, second = (record.getMessage() for record in caplog.records)
    assert "http://host:1" in first
    assert "connection refused" in first
    assert "traceback" not in first
    assert "back after 72 s" in second


def test_a_flush_waits_no_longer_than_allowed_for_a_backend_that_is_down() -> None:
    courier = Courier(Backend().deliver, "x", retry_s=(0.01, 0.01))
    courier.start()
    started = time.monotonic()
    assert not courier.flush(0.3)
    assert not courier.stop(0.2)
    assert 0.4 < time.monotonic() - started < 2


def test_a_flush_does_not_sleep_out_a_long_pause() -> None:
    backend = Backend()
    courier = Courier(backend.deliver, "x", retry_s=(0.05, 3600.0))
    for _ in range(20):
        courier.pass_once()  # the next pause would be an hour
    courier.start()
    time.sleep(0.1)
    backend.down = False
    assert courier.flush(5)
    assert courier.stop(5)


def test_a_flush_is_answered_by_a_pass_that_began_after_it() -> None:
    entered, leave = threading.Event(), threading.Event()
    owed, delivered = ["first"], []

    def deliver() -> None:
        taken = list(owed)
        entered.set()
        leave.wait(5)
        delivered[:] = taken

    courier = Courier(deliver, "x", interval_s=0.01)
    courier.start()
    entered.wait(5)
    owed.append("second")  # the pass under way has looked already
    threading.Timer(0.05, leave.set).start()
    assert courier.flush(5)
    assert delivered == ["first", "second"]
    assert courier.stop(5)


def test_a_delivery_that_hangs_does_not_hold_the_end_up() -> None:
    hang = threading.Event()
    courier = Courier(lambda: hang.wait(30), "x")
    courier.start()
    started = time.monotonic()
    assert not courier.stop(0.2)
    assert time.monotonic() - started < 2
    hang.set()
