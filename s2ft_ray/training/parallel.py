"""Where the weights live: the mesh of workers, and FSDP2 over it.

Two layouts of the frozen base, one of the slices:

- ``replicate``: each worker holds the whole base, FSDP manages the slices alone. What travels in
  a step is the slices: one all-gather, one reduce-scatter.
- ``full``: the base is sharded too, gathered layer by layer in forward and backward, never reduced.

Invariant: in both, slices and so their gradients and optimizer state are sharded, gradients are
summed (not averaged) over workers, and the frozen base is in no optimizer and no reduction.
"""

from dataclasses import dataclass
from typing import Literal

import psutil
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

Sharding = Literal["replicate", "full"]

# Of the memory free for a worker, what the frozen base may take before it is sharded. The rest
# holds activations, logits and the slices' state; METHOD figures of 7B at 1024 tokens put the
# base at about half of the peak.
MAX_BASE_SHARE = 0.5


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


def resolve_sharding(asked: str, base_bytes: int, workers: Workers) -> tuple[Sharding, str]:
    """Decide where the base lives; return the mode and the reason for the log.

    ``auto`` takes ``replicate`` while the base fits into half of the least free memory that any
    worker has. Every worker gets the same answer.
    """
    if asked == "replicate":
        return "replicate", "as configured"
    if asked == "full":
        return "full", "as configured"
    assert asked == "auto", "the plan refuses what isn't there"
    free = torch.tensor(_free_bytes(workers), dtype=torch.float64, device=workers.device)
    dist.all_reduce(free, op=dist.ReduceOp.MIN)
    room = float(free) * MAX_BASE_SHARE
    mode: Sharding = "replicate" if base_bytes <= room else "full"
    fits = "fits into" if mode == "replicate" else "exceeds"
    return mode, (
        f"the base's {base_bytes / 2**20:.1f} MiB {fits} {MAX_BASE_SHARE:.0%} of the"
        f" {float(free) / 2**20:.0f} MiB free for a worker"
    )


def _free_bytes(workers: Workers) -> int:
    """Free memory of this worker's device; a host's memory is split among all workers."""
    if workers.device.type == "cuda":
        return torch.cuda.mem_get_info(workers.device)[0]
    return int(psutil.virtual_memory().available) // workers.world_size


def shard_model(model: nn.Module, workers: Workers, sharding: Sharding) -> None:
    """Apply FSDP2 to each decoder layer and to the model, in place.

    `model` is converted, on its device, and the same on every worker.
    """
    frozen = {p for p in model.parameters() if not p.requires_grad}
    replicate = sharding == "replicate"
    ignored = frozen if replicate else None
    # In replicate the slices stay gathered from forward to backward: half the gathers, and their
    # bytes are about 1% of the base's.
    reshard = not replicate
    for layer in [*_decoder_layers(model), model]:
        fully_shard(layer, mesh=workers.mesh, ignored_params=ignored, reshard_after_forward=reshard)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Gloo refuses other divide factors; the loss is divided by the global count of
            # targets instead.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def set_gradient_sync(model: nn.Module, enabled: bool) -> None:
    """Reduce gradients in the next backward, or only add them up locally."""
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(enabled)


def reshard(model: nn.Module) -> None:
    """Free what a forward without backward has left gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The blocks that Hugging Face declares as not to be split: the decoder layers."""
    names: set[str] = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    assert layers, f"{type(model).__name__} names no decoder layers in _no_split_modules"
    return layers
