"""What the Ray cluster has for the queue to give. Ray glue.

Invariant: workers that somebody else holds (Serve's replicas, other people's jobs) are taken off
a node before the queue sees it. Where Ray put a gang elsewhere than the ledger says, the queue
sees less than there is, never more.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from s2ft_ray.scheduler.views import NodeView

# Of every node, but nothing that a worker asks for.
_NOT_FOR_WORKERS = ("node:", "object_store_memory")
Amounts = Mapping[str, Mapping[str, float]]
"""By node id, by resource."""


class Cluster(Protocol):
    """The nodes, as they are now."""

    def nodes(self, held: Amounts) -> Sequence[NodeView]:
        """Return the nodes with what the queue may use of them; `held` is what its jobs hold."""


class RayCluster:
    """The cluster that this process is connected to."""

    def nodes(self, held: Amounts) -> Sequence[NodeView]:
        import ray
        from ray._private.state import available_resources_per_node

        available = available_resources_per_node()
        views = []
        for node in ray.nodes():
            if node["Alive"]:
                node_id = node["NodeID"]
                total = {k: v for k, v in node["Resources"].items() if _is_for_workers(k)}
                usable = without_others(total, available.get(node_id, total), held.get(node_id, {}))
                views.append(NodeView(node_id, usable, dict(node.get("Labels") or {})))
        return views


def without_others(
    total: Mapping[str, float], available: Mapping[str, float], held: Mapping[str, float]
) -> dict[str, float]:
    """Return a node's amounts less what others hold of it."""
    usable = {}
    for name, amount in total.items():
        others = amount - available.get(name, 0.0) - held.get(name, 0.0)
        usable[name] = amount - max(others, 0.0)
    return usable


def _is_for_workers(resource: str) -> bool:
    return not resource.startswith(_NOT_FOR_WORKERS)
