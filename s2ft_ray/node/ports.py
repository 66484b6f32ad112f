"""Where a node listens: every port laid out from one base, so that two homes don't collide.

Invariant: a base is handed out while one of its ports is held, so two nodes that start at the same
moment never get the same one.
"""

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

from s2ft_ray.errors import ConfigError, NodeError

LOOPBACK = "127.0.0.1"
SPAN = 500
"""Ports of one node: the fixed ones below, then one for each Ray worker process."""
DEFAULT_BASES = range(8600, 32000, SPAN)
"""Below 32768, where Linux takes the ports of outgoing connections from."""


class Port(IntEnum):
    """A port's distance from the base."""

    GCS = 0
    DASHBOARD = 1
    MLFLOW = 2
    DASHBOARD_AGENT = 3
    DASHBOARD_AGENT_GRPC = 4
    RUNTIME_ENV_AGENT = 5
    NODE_MANAGER = 6
    OBJECT_MANAGER = 7
    RAY_CLIENT = 8
    METRICS = 9
    DASHBOARD_METRICS = 10
    AUTOSCALER_METRICS = 11
    CLAIM = 12
    """Held by an `up` at work, free afterwards."""
    FIRST_WORKER = 20
    LAST_WORKER = SPAN - 1


LISTENING = [port for port in Port if port < Port.CLAIM]


@contextmanager
def claim_base(requested: int | None, remembered: int | None) -> Iterator[int]:
    """Hold a free base until the block ends: the requested one, or the first free.

    The remembered base of a home is tried before the others, so that addresses stay.
    Raises ConfigError if the requested base is no base or is taken.
    """
    if requested is not None:
        _check_base(requested)
        candidates = [requested]
    else:
        candidates = [*([] if remembered is None else [remembered]), *DEFAULT_BASES]
    for base in candidates:
        with socket.socket() as claim:
            if not _try_bind(claim, base + Port.CLAIM):
                continue
            taken = find_taken(base)
            if taken and requested is not None:
                listed = ", ".join(str(port) for port in taken)
                raise ConfigError(
                    f"--port-base {base}: port {listed} is taken; end what listens there, or leave"
                    " --port-base out to get the first free base"
                )
            if not taken:
                yield base
                return
    if requested is not None:
        raise ConfigError(f"--port-base {requested}: another node is just starting there")
    raise NodeError(f"no free port base from {DEFAULT_BASES[0]} to {DEFAULT_BASES[-1]}")


def find_taken(base: int) -> list[int]:
    """Return the fixed ports of `base` on which something listens already."""
    taken = []
    for port in LISTENING:
        with socket.socket() as probe:
            # a connection that was just closed (TIME_WAIT) doesn't make a port taken
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if not _try_bind(probe, base + port):
                taken.append(base + port)
    return taken


def _try_bind(sock: socket.socket, port: int) -> bool:
    try:
        sock.bind((LOOPBACK, port))
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            return False
        raise
    return True


def _check_base(base: int) -> None:
    last = 65535 - SPAN + 1
    if not 1024 <= base <= last:
        raise ConfigError(
            f"--port-base {base}: a node takes {SPAN} ports from its base; give 1024 to {last}"
        )
