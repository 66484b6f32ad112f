"""What a run takes on paper: bytes of a worker, bytes on the wire, bytes of a checkpoint.

Arithmetic over the base's configuration (built on the meta device, no weights), for decoders with
one MLP of three projections; tests hold it against what small runs measure.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from s2ft_ray.bases import local_folder
from s2ft_ray.config import RunConfig
from s2ft_ray.training.parallel import Layout, decoder_layers

SLICE_BYTES = 4  # fp32
STATE_BYTES = 16  # of a trained value: the slice, its gradient and Adam's two moments, in fp32
SAVED_BYTES = 12  # of a trained value in a checkpoint: the slice and the two moments


@dataclass(frozen=True)
class BaseSize:
    """Bytes of a base, by where FSDP gathers them; tied parameters count once."""

    parameters: int
    """Not bytes: how many there are."""
    total: int
    layer: int
    """Of the largest decoder layer."""
    root: int
    """Outside the decoder layers: embeddings, output projection, last norm."""
    largest_tensor: int


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one worker at its peak, by what takes them."""

    base: int
    """The frozen weights: all of them, or this worker's shard."""
    gathered: int
    """Of a sharded base, what is whole at one time: three layers (the one that works, the next,
    and its copy as it arrives) and what is outside them."""
    slices: int
    """Slices, gradients and optimizer state: this worker's shard, and what is whole of them."""
    activations: int
    """What the graph keeps of one micro-batch of the longest sequences, and its logits."""

    @property
    def total(self) -> int:
        return self.base + self.gathered + self.slices + self.activations


@dataclass(frozen=True)
class TrafficEstimate:
    """Bytes that one worker receives in one optimizer step."""

    gathered: int
    reduced: int

    @property
    def total(self) -> int:
        return self.gathered + self.reduced


def measure_base(config: RunConfig, model_config: PretrainedConfig) -> BaseSize:
    """Size the base that `model_config` describes, in the dtype that the run loads it in."""
    if config.model.trust_remote_code:  # the model's own code is looked for under this name
        model_config = copy.deepcopy(model_config)
        model_config._name_or_path = str(local_folder(config.model, weights=False))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            model_config, trust_remote_code=config.model.trust_remote_code
        )
    width = dtype_bytes(config, model_config)
    layers = [_count(layer) for layer in decoder_layers(model)]
    total = _count(model)
    return BaseSize(
        parameters=total,
        total=total * width,
        layer=max(layers) * width,
        root=(total - sum(layers)) * width,
        largest_tensor=max(p.numel() for p in model.parameters()) * width,
    )


def dtype_bytes(config: RunConfig, model_config: PretrainedConfig) -> int:
    """Return the bytes of one frozen weight."""
    name = config.model.dtype
    dtype = (model_config.dtype or torch.float32) if name == "auto" else getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype.itemsize


def estimate_memory(
    config: RunConfig,
    model_config: PretrainedConfig,
    base: BaseSize,
    num_trainable: int,
    seq_len: int,
    layout: Layout,
) -> MemoryEstimate:
    """Add up what a worker of `layout` holds while it trains on sequences of `seq_len`.

    Of preferences it holds the slices' first values too.
    """
    width = dtype_bytes(config, model_config)
    held_bytes = STATE_BYTES + (SLICE_BYTES if config.objective.loss == "dpo" else 0)
    if layout.sharding == "replicate":
        held, gathered = base.total, 0
        # Whole while a step lasts: the slices, their gradients, and (always) the base's own
        # values in their place.
        whole = 2 * SLICE_BYTES + width
    else:
        held = -(-base.total // layout.group)
        gathered = base.root + 3 * base.layer if layout.group > 1 else 0
        # Gradients stay whole only from one micro-batch to the next.
        accumulates = _num_passes(config, layout.num_workers) > 1
        whole = SLICE_BYTES * accumulates + width
    return MemoryEstimate(
        base=held,
        gathered=gathered,
        slices=num_trainable * held_bytes // layout.slice_shards + num_trainable * whole,
        activations=_activations(config, model_config, width, seq_len),
    )


def _activations(
    config: RunConfig, model_config: PretrainedConfig, width: int, seq_len: int
) -> int:
    """Count the bytes of one micro-batch.

    Of each token and layer the graph keeps, in the base's dtype, q, k, v and the attention's
    output (2 D + 2 D of which k and v only have the KV heads' share) and gate, its activation and
    up (3 F); in fp32 the inputs of the two norms (2 D). With activation checkpointing it keeps
    the layers' inputs, and one layer's part at a time. Logits: in the base's dtype, in fp32, and
    their gradient. A pair of preferences is two sequences.
    """
    hidden = model_config.hidden_size
    heads: int = model_config.num_attention_heads
    kv_share = (_first(model_config, "num_key_value_heads") or heads) / heads
    intermediate = _first(model_config, "intermediate_size", "ffn_dim", "n_inner") or 4 * hidden
    sequences = config.optim.micro_batch_size * (2 if config.objective.loss == "dpo" else 1)
    tokens = sequences * seq_len
    values = (2 + 2 * kv_share) * hidden + 3 * intermediate
    layer = int(tokens * (values * width + 2 * hidden * 4))
    layers = model_config.num_hidden_layers
    if config.parallel.activation_checkpointing:
        kept = layers * tokens * hidden * width + layer
    else:
        kept = layers * layer
    return int(kept + tokens * model_config.vocab_size * (width + 8))


def estimate_traffic(
    config: RunConfig, base: BaseSize, num_trainable: int, layout: Layout
) -> TrafficEstimate:
    """Add up what a worker of `layout` receives in a step.

    ``replicate`` gathers the slices once for each micro-batch and once for the write-back;
    ``full`` gathers the base and the slices in forward and again in backward. Slice gradients are
    reduced once a step, and under ``hybrid`` once more among the groups. For the reference of
    preferences ``replicate`` gathers the slices once, and for each of the two exchanges; ``full``
    makes one more forward pass of each micro-batch.

    Left out, being less than the slices are: the write-back under ``full`` and ``hybrid``, which
    gathers those of rows (q, k, v, up, gate), and the few numbers that the workers agree on.
    """
    slices = num_trainable * SLICE_BYTES
    shards = layout.slice_shards
    remote = (shards - 1) / shards
    passes = _num_passes(config, layout.num_workers)
    is_dpo = config.objective.loss == "dpo"
    if layout.sharding == "replicate":
        gathered = (passes + (4 if is_dpo else 1)) * slices * remote
    else:
        gathered = (3 if is_dpo else 2) * passes * (base.total + slices) * remote
    groups = layout.num_workers // shards
    among_groups = 2 * slices / shards * (groups - 1) / groups  # a ring: there and back
    return TrafficEstimate(int(gathered), int(slices * remote + among_groups))


def estimate_checkpoint(num_trainable: int) -> int:
    """Return the bytes of a checkpoint's tensors, over all workers."""
    return num_trainable * SAVED_BYTES


def _num_passes(config: RunConfig, num_workers: int) -> int:
    """Micro-batches of one worker in a step."""
    batches = config.optim.global_batch_size // config.optim.micro_batch_size
    return -(-batches // num_workers)


def _first(model_config: PretrainedConfig, *names: str) -> Any:
    return next((value for name in names if (value := getattr(model_config, name, None))), None)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
