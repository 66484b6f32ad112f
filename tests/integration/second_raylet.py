"""A second raylet on loopback: `ray start` would ask for the head on the machine's own address.

python second_raylet.py ADDRESS NUM_CPUS      says "up" once it has joined, lives until killed
"""

import os
import signal
import sys

from ray._private.node import Node
from ray._private.parameter import RayParams

if __name__ == "__main__":
    params = RayParams(
        gcs_address=sys.argv[1],
        node_ip_address="127.0.0.1",
        num_cpus=int(sys.argv[2]),
        object_store_memory=80_000_000,
        include_log_monitor=False,
        node_manager_port=0,
        dashboard_agent_listen_port=None,
        min_worker_port=0,
        max_worker_port=0,
    )
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Ray prints too
    Node(params, head=False, shutdown_at_exit=False, spawn_reaper=False)
    print("up", file=told, flush=True)
    signal.pause()
