"""One thread of another process, stopped by the kernel while its other threads go on."""

import ctypes
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from nodes import BIN

_ATTACH, _DETACH = 16, 17
_ANY_THREAD = 0x40000000
"""``__WALL``: threads of other processes can be waited for, too."""
_TRIES = 20

_libc = ctypes.CDLL(None, use_errno=True)


def find_thread(pid: int, function: str) -> int:
    """Return the id of the Python thread that has `function` on its stack."""
    dump = [str(BIN / "py-spy"), "dump", "--json", "--pid", str(pid)]
    done = subprocess.run(dump, capture_output=True, text=True, check=True)
    threads = json.loads(done.stdout)
    found = [
        thread
        for thread in threads
        if any(frame["name"].rpartition(".")[2] == function for frame in thread["frames"])
    ]
    assert len(found) == 1, f"{len(found)} threads of {pid} are in {function}: {done.stdout}"
    return int(found[0]["os_thread_id"])


@contextmanager
def halted_alone(thread_id: int, others_go_on: Callable[[], bool]) -> Iterator[None]:
    """Give a context in which the thread stands still, and not with Python's lock, which all need.

    For the thread that enters it alone. Its process may be killed within.
    """
    for _ in range(_TRIES):
        _ptrace(_ATTACH, thread_id)
        os.waitpid(thread_id, _ANY_THREAD)
        if others_go_on():
            break
        _ptrace(_DETACH, thread_id)
        time.sleep(0.1)
    else:
        raise AssertionError(f"in {_TRIES} tries thread {thread_id} had Python's lock")
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            _ptrace(_DETACH, thread_id)


def _ptrace(request: int, thread_id: int) -> None:
    if _libc.ptrace(request, thread_id, None, None) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"ptrace {request} of {thread_id}: {os.strerror(number)}")
