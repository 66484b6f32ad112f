"""Where the weights live: the mesh of workers, and FSDP2 over it.

Three layouts of the frozen base, one of the slices:

- ``replicate``: each worker holds the whole base, FSDP manages the slices alone, of as many layers
  together as have BUCKET_BYTES of them. What travels in a step is the slices: one all-gather for a
  micro-batch, one reduce-scatter.
- ``full``: the base is sharded too, gathered layer by layer in forward and backward, never reduced.
- ``hybrid``: sharded among the workers of a group (by default those of a node), a copy in each
  group: the base travels inside a group only, slice gradients between the groups too.

Invariant: in each, slices and so their gradients and optimizer state are sharded, gradients are
summed (not averaged) over workers, and the frozen base is in no optimizer and no reduction.
"""

import logging
import math
import os
import time
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import psutil
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from s2ft_ray.method import BUCKET_BYTES

logger = logging.getLogger(__name__)
Sharding = Literal["replicate", "full", "hybrid"]
PROGRESS_S = 10.0
"""How often a base that is being read in parts is told of."""


@dataclass(frozen=True)
class Layout:
    """How the weights are laid out over the workers."""

    sharding: Sharding
    num_workers: int
    group: int
    """Workers that hold one copy of the base together: 1 under ``replicate``."""

    @property
    def slice_shards(self) -> int:
        """Over how many workers the slices and their optimizer state are spread."""
        return self.group if self.sharding == "hybrid" else self.num_workers

    @classmethod
    def of(cls, sharding: Sharding, num_workers: int, group: int) -> "Layout":
        """Lay out `sharding`; `group` counts under ``hybrid`` alone."""
        sizes = {"replicate": 1, "full": num_workers, "hybrid": group}
        return cls(sharding, num_workers, sizes[sharding])


@dataclass(frozen=True)
class Workers:
    """This process among its peers. The process group must exist."""

    device: torch.device
    mesh: DeviceMesh

    @classmethod
    def join(cls, device: torch.device) -> "Workers":
        """Build the mesh of all processes of the default group."""
        mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("shard",))
        return cls(device=device, mesh=mesh)

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        return dist.get_world_size()

    def sum(self, values: list[float]) -> list[float]:
        """Add `values` up over all workers, in float64."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def count_by_node(self, node_id: str) -> dict[str, int]:
        """Return the number of workers on each node, `node_id` being this one's."""
        nodes = [node_id] * self.world_size
        dist.all_gather_object(nodes, node_id)
        return dict(Counter(nodes))

    def node_group(self) -> int:
        """Return the largest group size that divides the workers of every node.

        Ray Train and torchrun number the workers of a node one after the other, so such groups
        never reach over a node's edge.
        """
        mine = int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))
        sizes = [mine] * self.world_size
        dist.all_gather_object(sizes, mine)
        return math.gcd(*sizes)

    def free_bytes(self) -> int:
        """Return the least free memory of a worker; a host's memory is split among its workers."""
        if self.device.type == "cuda":
            mine = torch.cuda.mem_get_info(self.device)[0]
        else:
            local = int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))
            mine = int(psutil.virtual_memory().available) // local
        least = torch.tensor(mine, dtype=torch.float64, device=self.device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        return int(least)


def shard_model(model: nn.Module, workers: Workers, layout: Layout) -> None:
    """Apply FSDP2 to the decoder layers and to the model, in place.

    `model` is converted, on its device, and the same on every worker.
    """
    frozen = {p for p in model.parameters() if not p.requires_grad}
    replicate = layout.sharding == "replicate"
    ignored = frozen if replicate else None
    # In replicate the slices stay gathered from forward to backward: half the gathers, and their
    # bytes are about 1% of the base's.
    reshard = not replicate
    mesh = _build_mesh(workers, layout)
    layers, told = decoder_layers(model), time.monotonic()
    units = _join_small(layers) if replicate else [[layer] for layer in layers]
    done = 0
    for unit in [*units, [model]]:
        # Of a mapped base this reads the worker's part of the layers from its files.
        fully_shard(unit, mesh=mesh, ignored_params=ignored, reshard_after_forward=reshard)
        done = min(done + len(unit), len(layers))
        if workers.rank == 0 and time.monotonic() - told >= PROGRESS_S:
            told = time.monotonic()
            logger.info("%d of %d layers are laid out", done, len(layers))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Gloo refuses other divide factors; the loss is divided by the global count of
            # targets instead.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _join_small(layers: list[nn.Module]) -> list[list[nn.Module]]:
    """Group neighbours until each group has about BUCKET_BYTES of slices to gather at once."""
    groups: list[list[nn.Module]] = []
    room = 0
    for layer in layers:
        size = sum(p.numel() * p.element_size() for p in layer.parameters() if p.requires_grad)
        if room < size or not groups:
            groups.append([])
            room = BUCKET_BYTES
        groups[-1].append(layer)
        room -= size
    return groups


def _build_mesh(workers: Workers, layout: Layout) -> DeviceMesh:
    if layout.sharding != "hybrid":
        return workers.mesh
    assert layout.num_workers % layout.group == 0, "resolve_layout takes groups that divide"
    return init_device_mesh(
        workers.device.type,
        (layout.num_workers // layout.group, layout.group),
        mesh_dim_names=("replicate", "shard"),
    )


def set_gradient_sync(model: nn.Module, enabled: bool) -> None:
    """Reduce gradients in the next backward, or only add them up locally."""
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(enabled)


def reshard(model: nn.Module) -> None:
    """Free what a forward without backward has left gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the blocks that Hugging Face declares as not to be split: the decoder layers."""
    names: set[str] = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    assert layers, f"{type(model).__name__} names no decoder layers in _no_split_modules"
    return layers
