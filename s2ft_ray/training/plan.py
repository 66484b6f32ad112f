"""What a run will be, before anything is started: checked inputs, encoded data, estimates.

Invariant: a plan exists only for a run whose base, architecture, selection, data and parent were
all found and fit each other; its configuration names them so that any process finds them.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from s2ft_ray.bases import base_name, load_model_config, load_tokenizer
from s2ft_ray.config import RunConfig
from s2ft_ray.data import PreparedData, num_sequences, num_steps, prepare_data, preview
from s2ft_ray.errors import ConfigError, S2FTError
from s2ft_ray.method import check_supported, count_trainable
from s2ft_ray.registry import Parent, resolve_parent

MIB = 2**20
STATE_BYTES = 16  # of a trained value: the slice, its gradient and Adam's two moments, in fp32


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one worker at its peak, by what takes them."""

    base: int
    """The frozen weights, where each worker holds all of them."""
    slices: int
    """Slices, gradients and optimizer state: this worker's share."""
    activations: int
    """What the graph keeps of one micro-batch of the longest sequences, and its logits."""

    @property
    def total(self) -> int:
        return self.base + self.slices + self.activations


@dataclass(frozen=True)
class RunPlan:
    """A run that could start now."""

    config: RunConfig
    """Resolved: absolute paths, the chat template's text, the parent's selection."""
    data: PreparedData
    tokenizer: PreTrainedTokenizerBase
    parent: Parent | None
    num_sequences: int
    """Rows in one epoch; packed sequences under packing."""
    num_parameters: int
    num_trainable: int
    memory: MemoryEstimate

    @property
    def num_steps(self) -> int:
        return num_steps(self.config.optim, self.num_sequences)

    def describe(self) -> str:
        """Return what the job's log begins with: a few lines for a person."""
        report, memory, optim = self.data.report, self.memory, self.config.optim
        unit = "packed sequences" if self.config.data.packing else "rows"
        lines = [
            f"model       {self.config.registered_name}, from {self.config.model.name_or_path}"
            + (f" and {self.config.registry.parent}" if self.parent else ""),
            f"trainable   {self.num_trainable:,} of {self.num_parameters:,} parameters"
            f" ({self.num_trainable / self.num_parameters:.2%})",
            f"data        {report.rows:,} rows to train on, {report.eval_rows:,} held out;"
            f" {report.dropped:,} dropped, {report.truncated:,} cut to"
            f" {self.config.data.max_seq_len} tokens",
            f"tokens      p50 {report.tokens_p50}, p99 {report.tokens_p99},"
            f" max {report.tokens_max}; {report.target_tokens:,} of {report.tokens:,} are targets",
            f"steps       {self.num_steps} of {optim.global_batch_size} {unit}",
            f"memory      about {memory.total / MIB:,.0f} MiB a worker: base"
            f" {memory.base / MIB:,.1f}, slices and optimizer {memory.slices / MIB:,.1f},"
            f" activations {memory.activations / MIB:,.1f}",
            *(f"dropped     {fault}" for fault in report.dropped_rows),
            *(f"note        {note}" for note in report.notes),
        ]
        return "\n".join(lines)


def describe_first_row(plan: RunPlan, *, color: bool) -> str:
    """Show the first training row; what is no target stands in brackets, or dim with `color`."""
    return preview(plan.data.train[0], plan.tokenizer, color=color)


def plan_run(config: RunConfig) -> RunPlan:
    """Check everything that can be known before a worker starts, and encode the data.

    Raises ConfigError, DataError or AdapterError with one line for each fault: first those of
    the base and the method, together with those of the data where both can be known.
    """
    config = _resolve_names(config)
    model_config = load_model_config(config.model)
    tokenizer = load_tokenizer(config.model, config.data.chat_template)
    faults: list[str] = []
    parent: Parent | None = None
    num_trainable = 0
    try:
        check_supported(model_config)
        _check_sharding(config)
        parent = resolve_parent(config)
        if parent:
            config = config.model_copy(update={"method": parent.adapter.config})
            num_trainable = parent.adapter.num_parameters
        else:
            num_trainable = count_trainable(model_config, config.method)
    except S2FTError as error:
        faults += error.faults
    try:
        data = prepare_data(config.data, tokenizer, config.seed)
    except S2FTError as error:
        raise type(error)(*faults, *error.faults) from error
    if faults:
        raise ConfigError(*faults)
    packing = config.data.max_seq_len if config.data.packing else None
    return RunPlan(
        config=config,
        data=data,
        tokenizer=tokenizer,
        parent=parent,
        num_sequences=num_sequences(data.train, packing, config.seed),
        num_parameters=_count_parameters(model_config),
        num_trainable=num_trainable,
        memory=estimate_memory(
            config, model_config, num_trainable, packing or data.report.tokens_max
        ),
    )


def _resolve_names(config: RunConfig) -> RunConfig:
    """Name inputs so that a process in another folder, or later, finds the same."""
    template = config.data.chat_template
    if template and "{" not in template and Path(template).expanduser().is_file():
        template = Path(template).expanduser().read_text(encoding="utf-8")
    data = config.data.model_copy(
        update={
            "train": _absolute(config.data.train),
            "eval": _absolute(config.data.eval) if config.data.eval else None,
            "chat_template": template,
        }
    )
    model = config.model.model_copy(update={"name_or_path": base_name(config.model.name_or_path)})
    return config.model_copy(update={"data": data, "model": model})


def _absolute(path: str) -> str:
    return path if "://" in path else str(Path(path).expanduser().absolute())


def _check_sharding(config: RunConfig) -> None:
    if config.parallel.sharding == "hybrid":
        raise ConfigError(
            "parallel.sharding: hybrid is not available in this version; take auto, replicate or"
            " full"
        )


def _count_parameters(model_config: PretrainedConfig) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    return sum(p.numel() for p in model.parameters())


def estimate_memory(
    config: RunConfig, model_config: PretrainedConfig, num_trainable: int, seq_len: int
) -> MemoryEstimate:
    """Add up what a worker holds, for the decoders of the Llama family.

    Of each token and layer the graph keeps, in the base's dtype, q, k, v and the attention's
    output (2 D + 2 D of which k and v only have the KV heads' share) and gate, its activation and
    up (3 F); in fp32 the inputs of the two norms (2 D). With activation checkpointing it keeps
    the layers' inputs, and one layer's part at a time. Logits: in the base's dtype, in fp32, and
    their gradient.
    """
    workers = config.parallel.num_workers
    num_workers = workers if isinstance(workers, int) else workers[0]
    width = _dtype_bytes(config, model_config)
    hidden, intermediate = model_config.hidden_size, model_config.intermediate_size
    kv_share = model_config.num_key_value_heads / model_config.num_attention_heads
    tokens = config.optim.micro_batch_size * seq_len
    values = (2 + 2 * kv_share) * hidden + 3 * intermediate
    layer = int(tokens * (values * width + 2 * hidden * 4))
    layers = model_config.num_hidden_layers
    if config.parallel.activation_checkpointing:
        kept = layers * tokens * hidden * width + layer
    else:
        kept = layers * layer
    return MemoryEstimate(
        base=_count_parameters(model_config) * width,
        slices=num_trainable * STATE_BYTES // num_workers,
        activations=kept + tokens * model_config.vocab_size * (width + 8),
    )


def _dtype_bytes(config: RunConfig, model_config: PretrainedConfig) -> int:
    name = config.model.dtype
    dtype = (model_config.dtype or torch.float32) if name == "auto" else getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype.itemsize
