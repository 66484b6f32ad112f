"""What a run will be, before anything is started: checked inputs, encoded data, estimates.

Invariant: a plan exists only for a run whose base, architecture, selection, data and parent were
all found and fit each other; its configuration names them so that any process finds them.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from s2ft_ray.bases import base_name, load_model_config, load_tokenizer
from s2ft_ray.config import RunConfig, s2ft_home
from s2ft_ray.data import (
    PreparedData,
    absolute_name,
    num_sequences,
    num_steps,
    prepare_data,
    preview,
)
from s2ft_ray.errors import ConfigError, RegistryUnreachable, S2FTError
from s2ft_ray.method import check_packing, check_supported, count_trainable, num_positions
from s2ft_ray.registry import NamedAdapter, Parent, resolve_avoided, resolve_parent
from s2ft_ray.training.layout import describe_group
from s2ft_ray.training.memory import (
    BaseSize,
    MemoryEstimate,
    TrafficEstimate,
    estimate_checkpoint,
    estimate_memory,
    estimate_traffic,
    measure_base,
)
from s2ft_ray.training.parallel import Layout, Sharding

MIB = 2**20


@dataclass(frozen=True)
class Cost:
    """What a layout of the run takes, on paper."""

    layout: Layout
    memory: MemoryEstimate
    traffic: TrafficEstimate


@dataclass(frozen=True)
class RunPlan:
    """A run that could start now."""

    config: RunConfig
    """Resolved: absolute paths, the chat template's text, the parent's selection."""
    data: PreparedData
    tokenizer: PreTrainedTokenizerBase
    parent: Parent | None
    avoided: list[NamedAdapter]
    num_sequences: int
    """Rows in one epoch; packed sequences under packing."""
    packed_share: float | None
    """Of the room in packed sequences what tokens fill; None without packing."""
    num_parameters: int
    num_trainable: int
    costs: list[Cost]
    """Of the layout that is asked for, or of those that ``auto`` chooses from."""

    @property
    def num_steps(self) -> int:
        return num_steps(self.config.optim, self.num_sequences)

    def describe(self) -> str:
        """Return what the job's log begins with: a few lines for a person."""
        report, optim = self.data.report, self.config.optim
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
            *self._describe_packing(),
            f"steps       {self.num_steps} of {optim.global_batch_size} {unit}",
            *map(_describe_memory, self.costs),
            *map(_describe_traffic, self.costs),
            f"checkpoint  {estimate_checkpoint(self.num_trainable) / MIB:,.1f} MiB: slices and"
            " optimizer state",
            *(f"dropped     {fault}" for fault in report.dropped_rows),
            *(f"note        {note}" for note in report.notes),
        ]
        return "\n".join(lines)

    def _describe_packing(self) -> list[str]:
        if self.packed_share is None:
            return []
        return [
            f"packing     {self.data.report.rows:,} rows in {self.num_sequences:,} sequences of"
            f" {self.config.data.max_seq_len} tokens, {self.packed_share:.1%} of them filled"
        ]


def _describe_memory(cost: Cost) -> str:
    memory = cost.memory
    gathered = f" and {memory.gathered / MIB:,.1f} gathered" if memory.gathered else ""
    return (
        f"memory      about {memory.total / MIB:,.0f} MiB on each of {cost.layout.num_workers}"
        f" worker(s) in {cost.layout.sharding}{describe_group(cost.layout)}:"
        f" base {memory.base / MIB:,.1f}{gathered},"
        f" slices and optimizer {memory.slices / MIB:,.1f},"
        f" activations {memory.activations / MIB:,.1f}"
    )


def _describe_traffic(cost: Cost) -> str:
    traffic = cost.traffic
    return (
        f"traffic     about {traffic.total / MIB:,.1f} MiB into each worker in a step of"
        f" {cost.layout.sharding}: gathered {traffic.gathered / MIB:,.1f},"
        f" reduced {traffic.reduced / MIB:,.1f}"
    )


def describe_first_row(plan: RunPlan, *, color: bool) -> str:
    """Show the first training row; what is no target stands in brackets, or dim with `color`."""
    return preview(plan.data.train[0], plan.tokenizer, color=color)


def plan_run(config: RunConfig) -> RunPlan:
    """Check everything that can be known before a worker starts, and encode the data.

    Raises ConfigError, DataError or AdapterError with one line for each fault: first those of
    the base and the method, together with those of the data where both can be known;
    RegistryUnreachable where a registered parent can't be looked up now.
    """
    config = _resolve_names(config)
    model_config = load_model_config(config.model)
    tokenizer = load_tokenizer(config.model, config.data.chat_template)
    faults: list[str] = []
    parent: Parent | None = None
    avoided: list[NamedAdapter] = []
    num_trainable = 0
    try:
        check_supported(model_config)
        if config.data.packing:
            check_packing(model_config)
        parent, avoided = resolve_parent(config), resolve_avoided(config)
        if parent:
            config = config.model_copy(update={"method": parent.adapter.config})
            num_trainable = parent.adapter.num_parameters
        else:
            num_trainable = count_trainable(model_config, config.method)
    except RegistryUnreachable:
        raise  # no fault of the run's: it may be found later
    except S2FTError as error:
        faults += error.faults
    try:
        data = prepare_data(config.data, tokenizer, config.seed, s2ft_home() / "cache" / "rows")
    except S2FTError as error:
        raise type(error)(*faults, *error.faults) from error
    if data.report.format == "preference" and config.objective.loss != "dpo":
        faults.append(
            "objective.loss: the rows are preferences (prompt, chosen, rejected): set dpo, or name"
            " other rows in data.train"
        )
    faults += _find_length_faults(config, model_config, data)
    if faults:
        raise ConfigError(*faults)
    packing = config.data.max_seq_len if config.data.packing else None
    packed_share = None
    if packing is not None:
        once = [(count, 1.0) for count, _ in data.groups]
        room = num_sequences(data.train, packing, config.seed, once) * packing
        packed_share = data.report.tokens / room
    base = measure_base(config, model_config)
    return RunPlan(
        config=config,
        data=data,
        tokenizer=tokenizer,
        parent=parent,
        avoided=avoided,
        num_sequences=num_sequences(data.train, packing, config.seed, data.groups),
        packed_share=packed_share,
        num_parameters=base.parameters,
        num_trainable=num_trainable,
        costs=_estimate_costs(
            config, model_config, base, num_trainable, packing or data.report.tokens_max
        ),
    )


def _find_length_faults(
    config: RunConfig, model_config: PretrainedConfig, data: PreparedData
) -> list[str]:
    """Say where rows reach beyond the last position that the base was made with."""
    positions = num_positions(model_config)
    if positions is None:
        return []
    longest = config.data.max_seq_len if config.data.packing else data.longest()
    if longest <= positions:
        return []
    return [
        f"data.max_seq_len {config.data.max_seq_len}: rows are up to {longest} tokens long, and"
        f" {config.model.name_or_path} has embeddings for {positions} positions; take at most"
        f" {positions}"
    ]


def _resolve_names(config: RunConfig) -> RunConfig:
    """Name inputs so that a process in another folder, or later, finds the same."""
    template = config.data.chat_template
    if template and "{" not in template and Path(template).expanduser().is_file():
        template = Path(template).expanduser().read_text(encoding="utf-8")
    files = [
        file.model_copy(update={"path": absolute_name(file.path)})
        for file in config.data.train_files
    ]
    train = files[0].path if isinstance(config.data.train, str) else files
    data = config.data.model_copy(
        update={
            "train": train,
            "eval": absolute_name(config.data.eval) if config.data.eval else None,
            "chat_template": template,
        }
    )
    if config.objective.loss == "dpo":
        data = data.model_copy(update={"format": "preference"})
    model = config.model.model_copy(update={"name_or_path": base_name(config.model.name_or_path)})
    return config.model_copy(update={"data": data, "model": model})


def _estimate_costs(
    config: RunConfig,
    model_config: PretrainedConfig,
    base: BaseSize,
    num_trainable: int,
    seq_len: int,
) -> list[Cost]:
    """Estimate the layout that is asked for; under ``auto`` the two ends of the choice."""
    parallel = config.parallel
    workers = parallel.num_workers
    num_workers = workers if isinstance(workers, int) else workers[0]
    modes: list[Sharding] = (
        ["replicate", "full"] if parallel.sharding == "auto" else [parallel.sharding]
    )
    # Where the workers will stand isn't known here: without shard_group they are one node's.
    group = math.gcd(parallel.shard_group or num_workers, num_workers)
    layouts = [Layout.of(mode, num_workers, group) for mode in modes]
    return [
        Cost(
            layout,
            estimate_memory(config, model_config, base, num_trainable, seq_len, layout),
            estimate_traffic(config, base, num_trainable, layout),
        )
        for layout in layouts
    ]
