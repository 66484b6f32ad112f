"""One machine's node: the Ray head and the MLflow server that belong to one S2FT_HOME.

    services.py   what is started: commands, environment, how each says that it is ready
    ports.py      where it listens: every port, laid out from one base
    record.py     what was started: node.json, and the lock that guards it
    processes.py  who is who: alive, marked as ours, ended
    lifecycle.py  up, down, status

Invariant: what is ended was started here. A process is known by pid and start time, or by the mark
that its environment carries; nothing is ever found by name, and `ray stop` is never called.
"""

from s2ft_ray.node.lifecycle import NodeStatus, ServiceStatus, down, status, up

__all__ = ["NodeStatus", "ServiceStatus", "down", "status", "up"]
