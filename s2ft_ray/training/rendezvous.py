"""How the workers of a run find each other: on the network by which Ray reaches their nodes."""

import os
import socket

import psutil
import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.execution.worker_group import WorkerGroup


class NodeNetworkConfig(TorchConfig):  # type: ignore[misc]
    """Ray Train's, with gloo kept to the interface that has the node's address.

    Left alone gloo takes the one that the host name stands for: on many a Linux 127.0.0.1, where
    no other machine is met. NCCL leaves loopback out by itself, and checkpoints need gloo there
    too.
    """

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _NodeNetworkBackend


class _NodeNetworkBackend(_TorchBackend):  # type: ignore[misc]
    def on_start(self, worker_group: WorkerGroup, backend_config: TorchConfig) -> None:
        worker_group.execute(_keep_to_node_network)
        super().on_start(worker_group, backend_config)


def _keep_to_node_network() -> None:
    name = interface_of(ray.util.get_node_ip_address())
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def interface_of(address: str) -> str | None:
    """Return the name of this machine's interface with `address`; None where it has none.

    A container may be reached by an address that only its host has.
    """
    families = (socket.AF_INET, socket.AF_INET6)
    for name, parts in psutil.net_if_addrs().items():
        if any(part.family in families and part.address == address for part in parts):
            return name
    return None
