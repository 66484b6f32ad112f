"""What the Ray cluster has for the queue to give. Ray glue.

Invariant: workers that somebody else holds (Serve's replicas, other people's jobs) are taken off
a node before the queue sees it; a node that is being drained it doesn't see. Where Ray put a gang
elsewhere than the ledger says, the queue sees less than there is, never more; that ends as soon as
the workers have started and told where they are.

Ray tells nobody what its autoscaler may add, so the operator does (``settings.NodeGroup``).
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from s2ft_ray.scheduler.settings import NodeGroup
from s2ft_ray.scheduler.views import NodeView

# Of every node, but nothing that a worker asks for.
_NOT_FOR_WORKERS = ("node:", "object_store_memory")
# KubeRay and `ray up` label their nodes with it.
_GROUP_LABEL = "ray.io/node-group"
Amounts = Mapping[str, Mapping[str, float]]
"""By node id, by resource."""


class Cluster(Protocol):
    """The nodes, as they are now."""

    def nodes(self, held: Amounts) -> Sequence[NodeView]:
        """Return the nodes with what the queue may use of them; `held` is what its jobs hold."""


class RayCluster:
    """The cluster that this process is connected to, with what its autoscaler may add."""

    def __init__(self, groups: Sequence[NodeGroup] = ()) -> None:
        self._groups = groups

    def nodes(self, held: Amounts) -> Sequence[NodeView]:
        import ray
        from ray._private.state import available_resources_per_node, state

        available, draining = available_resources_per_node(), state.get_draining_nodes()
        views = []
        for node in ray.nodes():
            node_id = node["NodeID"]
            if node["Alive"] and node_id not in draining:
                total = {k: v for k, v in node["Resources"].items() if _is_for_workers(k)}
                usable = without_others(total, available.get(node_id, total), held.get(node_id, {}))
                labels = dict(node.get("Labels") or {})
                views.append(NodeView(node_id, usable, labels, capacity=total))
        return [*views, *still_to_come(self._groups, views)]


def still_to_come(groups: Sequence[NodeGroup], nodes: Sequence[NodeView]) -> list[NodeView]:
    """Return the nodes that the autoscaler may add to those that are there.

    The first of a group are those that are there, so an id that the ledger holds is not offered
    again once its node has come.
    """
    views = []
    for group in groups:
        labels = {**group.labels, _GROUP_LABEL: group.name}
        there = sum(_is_of(node, group) for node in nodes)
        for number in range(there, group.max_nodes):
            views.append(NodeView(f"{group.name}/{number}", group.resources, labels, present=False))
    return views


def _is_of(node: NodeView, group: NodeGroup) -> bool:
    name = node.labels.get(_GROUP_LABEL)
    if name is not None:
        return name == group.name
    total = node.capacity or node.total
    return all(total.get(key, 0.0) >= amount for key, amount in group.resources.items())


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
