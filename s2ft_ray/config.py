"""A run as one YAML document: its sections, their limits, and how a fault in them is told.

Invariant: a ``RunConfig`` that exists is consistent in itself. What needs the world (does the
model exist, has the cluster room, is the data readable) is checked by the part that looks.
Imports no torch, ray or mlflow, so that a waiting driver or a command line starts at once.
"""

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from s2ft_ray.errors import ConfigError

NAME_PATTERN = r"^[a-z0-9][a-z0-9-]{0,62}$"
RESERVED_ALIAS = re.compile(r"(?i:latest)|[vV][0-9]+")
"""What MLflow takes for no alias, but for a version."""
Projection = Literal["q", "k", "v", "o", "up", "gate", "down"]
Share = Annotated[float, Field(gt=0, le=1)]


def s2ft_home() -> Path:
    """Return the folder of this machine's state: ``$S2FT_HOME``, else ``~/.s2ft_ray``."""
    return Path(os.environ.get("S2FT_HOME") or Path.home() / ".s2ft_ray").expanduser().absolute()


class Section(BaseModel):
    """A part of the document: unknown keys are faults, values don't change after reading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def _expand_range(layers: Any) -> Any:
    if isinstance(layers, str) and (ends := re.fullmatch(r"(\d+)-(\d+)", layers)):
        return list(range(int(ends[1]), int(ends[2]) + 1))
    return list(layers) if isinstance(layers, range) else layers


def _check_selection(budgets: dict[Projection, float]) -> dict[Projection, float]:
    if not budgets:
        raise ValueError("no budget is set; name at least one of q k v o up gate down")
    return budgets


class S2FTConfig(Section):
    """What is trained: which share of which projections, and how it is chosen.

    Source: arXiv 2412.06289, section 3.
    """

    budgets: Annotated[dict[Projection, Share], AfterValidator(_check_selection)] = {
        "o": 0.03,
        "down": 0.03,
    }
    """Share of the heads (q k v o) or channels (up gate down), above 0 and at most 1."""
    selection: Literal["random", "weight", "activation", "product", "gradient"] = "random"
    """What ranks heads and channels."""
    subset: Literal["small", "large"] = "small"
    """Which end of the score is taken; no meaning for ``random``."""
    allocation: Literal["uniform", "global"] = "uniform"
    """The same count in every layer, or the best over all layers."""
    layers: Annotated[list[int] | None, BeforeValidator(_expand_range)] = None
    """Indices of the decoder layers to train, or a range of them (``4-11``); None: all."""
    layout: Literal["gathered", "permuted"] = "gathered"
    """Slices gathered by index, or made contiguous by co-permutation; the same mathematics."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the random selection."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            faults = (_describe(fault, S2FTConfig) for fault in error.errors())
            raise ConfigError(*faults) from None


class ModelConfig(Section):
    """The base model."""

    name_or_path: str = "s2ft://tiny"
    """A Hugging Face name, a folder in Hugging Face layout, or the embedded ``s2ft://tiny``."""
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the frozen base; ``auto`` takes the checkpoint's. Slices and optimizer state are fp32."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa"
    trust_remote_code: bool = False


class WeightedFile(Section):
    """One of several files to train on."""

    path: str
    weight: float = Field(default=1.0, gt=0, le=100)
    """Passes over the file in one epoch: 2 sees each row twice, 0.5 half of them in turn."""


def _is_list(value: Any) -> str:
    """Choose one side of "a value or a list of them", so that a fault is told once."""
    return "several" if isinstance(value, list | tuple) else "one"


def _name_paths(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return [{"path": entry} if isinstance(entry, str) else entry for entry in value]


class DataConfig(Section):
    """The training data and how a row becomes tokens and targets."""

    train: Annotated[
        Annotated[str, Tag("one")]
        | Annotated[list[WeightedFile], Field(min_length=1), Tag("several")],
        Discriminator(_is_list),
        BeforeValidator(_name_paths),
    ]
    """A file of chat, prompt/completion, instruction or text rows, or several with weights: JSONL,
    JSON or Parquet, a path or URL; or a data set of the Hugging Face library (``name:split``)."""
    eval: str | None = None
    """A held-out file in the same form; None: rows are held out of ``train``."""
    format: Literal["auto", "chat", "completion", "instruction", "preference", "text"] = "auto"
    max_seq_len: int = Field(default=512, ge=2)
    """In tokens; longer rows are cut at the end, and counted."""
    packing: bool = False
    """Put several rows into one sequence, without attention across them."""
    shuffle_buffer: int | None = Field(default=None, ge=2)
    """None: each epoch is a permutation of all rows. A number: rows come as they lie in the file,
    mixed by a buffer of so many, for a file larger than memory on a disk slow at random places."""
    train_on: Literal["completion", "assistant", "all"] = "completion"
    """Which tokens are targets: the last completion, every assistant turn, or everything."""
    chat_template: str | None = None
    """A Jinja chat template, or a file that holds one; None: the tokenizer's own."""
    calibration_share: Share = 0.01
    """Share of the training rows, at least 32 of them, that a selection by ``activation``,
    ``product`` or ``gradient`` looks at."""
    invalid_rows: Literal["error", "drop"] = "error"
    """Refuse a file with faulty rows, or drop them, counted and named."""

    weight_key: str | None = None
    """A key of each row that holds a number above 0: how much the row's loss counts."""

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.packing and self.shuffle_buffer:
            raise ValueError(
                "shuffle_buffer with packing: a packed sequence has rows from all over the file;"
                " leave one of them out"
            )
        return self

    @property
    def train_files(self) -> list[WeightedFile]:
        """The files of ``train``, one or more."""
        return [WeightedFile(path=self.train)] if isinstance(self.train, str) else self.train


class ObjectiveConfig(Section):
    """What is minimized."""

    loss: Literal["cross_entropy", "dpo"] = "cross_entropy"
    """Of the target tokens, or of preferences: rows of prompt, chosen and rejected."""
    dpo_beta: float = Field(default=0.1, gt=0)
    """How strongly ``dpo`` holds the model to what it was at the run's start."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    neftune_alpha: float = Field(default=0.0, ge=0)
    """Noise on the input embeddings in training, 0: none; 5 is usual."""

    @model_validator(mode="after")
    def _check_loss(self) -> Self:
        if self.loss == "dpo" and (self.label_smoothing or self.neftune_alpha):
            raise ValueError("label_smoothing and neftune_alpha are for cross_entropy; leave out")
        return self


class OptimConfig(Section):
    """AdamW and its schedule."""

    lr: float = Field(default=2e-4, gt=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.95,
    )
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=0, ge=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    max_grad_norm: float = Field(default=1.0, gt=0)
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the data; one of epochs and max_steps, 3 epochs where neither is set."""
    max_steps: int | None = Field(default=None, ge=1)
    global_batch_size: int = Field(default=16, ge=1)
    """Rows (packed sequences under ``packing``) in one optimizer step, over all workers."""
    micro_batch_size: int = Field(default=4, ge=1)
    """Rows in one forward pass of one worker."""

    @model_validator(mode="before")
    @classmethod
    def _default_length(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("epochs") is values.get("max_steps") is None:
            return {**values, "epochs": 3.0}
        return values

    @model_validator(mode="after")
    def _check_length(self) -> Self:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError("epochs and max_steps are both set; keep one of them")
        return self


class ParallelConfig(Section):
    """The workers and what each holds."""

    num_workers: Annotated[
        Annotated[int, Field(ge=1), Tag("one")] | Annotated[tuple[int, int], Tag("several")],
        Discriminator(_is_list),
    ] = 1
    """How many, or [fewest, most]: the queue decides, and alone a run takes the most that fit."""
    resources_per_worker: dict[str, Annotated[float, Field(gt=0)]] = {"CPU": 1}
    labels_per_worker: dict[str, str] = {}
    """Labels of Ray that a worker's node must carry, e.g. ``ray.io/accelerator-type: H100``."""
    use_gpu: bool = False
    sharding: Literal["auto", "replicate", "full", "hybrid"] = "auto"
    """Where the frozen base lives: a copy on each worker, sharded over all (full) or inside each
    node with a copy on every node (hybrid). Slices are always sharded."""
    shard_group: int | None = Field(default=None, ge=1)
    """Workers that hold one copy of the base together under ``hybrid``; None: those of a node."""
    activation_checkpointing: bool = False

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        if isinstance(self.num_workers, tuple):
            low, high = self.num_workers
            if not 1 <= low <= high:
                raise ValueError(f"num_workers [{low}, {high}] is no range; write 1 <= low <= high")
        elif self.shard_group and self.num_workers % self.shard_group:
            raise ValueError(
                f"shard_group {self.shard_group} doesn't divide num_workers {self.num_workers};"
                " take a divisor, or leave it out to shard inside each node"
            )
        return self


class EvaluationConfig(Section):
    """What is looked at while the run goes on."""

    every_steps: int = Field(default=50, ge=1)
    """Evaluate on the held-out rows after so many steps, and at the end."""
    num_samples: int = Field(default=3, ge=0)
    """Held-out prompts whose greedy answers are shown with each evaluation."""
    max_new_tokens: int = Field(default=32, ge=1)
    """Length of such an answer."""
    patience: int | None = Field(default=None, ge=1)
    """End the run after so many evaluations in a row without a lower loss; None: never."""


def _as_folder(storage: Any) -> Any:
    if not isinstance(storage, str) or "://" not in storage:
        return storage
    scheme, _, path = storage.partition("://")
    if scheme == "file" and path.startswith("/"):
        return path
    raise ValueError(
        "runs live in a folder that every node mounts; mount what the URL names (JuiceFS, NFS,"
        " FSx, Filestore) and name the folder, or file:///..."
    )


class CheckpointConfig(Section):
    """Where and how often the run's state is saved."""

    storage_path: Annotated[str | None, BeforeValidator(_as_folder)] = None
    """Folder of the runs, or its file:// URL, mounted by every node; None: ``$S2FT_HOME/runs``."""
    every_steps: int = Field(default=50, ge=1)
    keep: int = Field(default=2, ge=1)
    """How many of the newest checkpoints stay."""
    select: Literal["last", "best"] = "last"
    """Which step becomes the adapter: the last, or the one whose held-out loss was lowest."""


def _check_alias(alias: str) -> str:
    if RESERVED_ALIAS.fullmatch(alias):
        raise ValueError("is reserved by MLflow; take another than latest or v<N>")
    return alias


class RegistryConfig(Section):
    """What becomes of the adapter."""

    alias: Annotated[str, AfterValidator(_check_alias)] = Field(
        default="champion", pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,62}$"
    )
    """The alias that the new version gets."""
    parent: str | None = None
    """An adapter to start from: ``<tenant>.<name>[:version|@alias]``, or an adapter's folder."""
    avoid: list[str] = []
    """Adapters of the same base, named alike, whose heads and channels this one leaves alone: fused
    with it, neither changes what the other has learned."""

    @model_validator(mode="after")
    def _check_avoid(self) -> Self:
        if self.parent is not None and self.avoid:
            raise ValueError(
                "avoid with parent: a run goes on with its parent's selection; leave one out"
            )
        return self


class TrackingConfig(Section):
    """Where metrics go."""

    uri: str | None = None
    """An MLflow tracking URI; None: ``$MLFLOW_TRACKING_URI``, else the SQLite file in S2FT_HOME."""
    experiment: str | None = None
    """None: ``s2ft/<tenant>``."""
    profile: bool = False
    """Leave a torch trace of three steps of each worker in the run folder, under profile/."""


class RunConfig(Section):
    """One fine-tune of one tenant. A run is a function of (config, data, base, seed)."""

    tenant: str = Field(pattern=NAME_PATTERN)
    name: str = Field(pattern=NAME_PATTERN)
    priority: int = 0
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the data's order; the selection has its own, ``method.seed``."""
    model: ModelConfig = ModelConfig()
    data: DataConfig
    method: S2FTConfig = S2FTConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig = OptimConfig()
    parallel: ParallelConfig = ParallelConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    registry: RegistryConfig = RegistryConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _check_batches(self) -> Self:
        batch, micro = self.optim.global_batch_size, self.optim.micro_batch_size
        if batch % micro:
            raise ValueError(
                f"optim.global_batch_size {batch} is no multiple of optim.micro_batch_size"
                f" {micro}; take {-(-batch // micro) * micro}"
            )
        workers = self.parallel.num_workers
        most = workers if isinstance(workers, int) else workers[1]
        if most > batch // micro:
            raise ValueError(
                f"parallel.num_workers {most}: a step has {batch // micro} micro-batches"
                f" (optim.global_batch_size {batch} / optim.micro_batch_size {micro}), and each"
                f" worker needs one; take at most {batch // micro} workers, or a larger batch"
            )
        return self

    @model_validator(mode="after")
    def _check_preferences(self) -> Self:
        is_dpo, form = self.objective.loss == "dpo", self.data.format
        if form != "auto" and is_dpo != (form == "preference"):
            raise ValueError(
                f"objective.loss {self.objective.loss} with data.format {form}: dpo trains on"
                " preference rows (prompt, chosen, rejected), and nothing else does"
            )
        if is_dpo and (self.data.packing or self.data.weight_key):
            raise ValueError("data.packing and data.weight_key are for cross_entropy; leave out")
        return self

    @model_validator(mode="after")
    def _check_packing(self) -> Self:
        # transformers finds packed samples of a batch of one alone under flash attention.
        flash = self.model.attn_implementation == "flash_attention_2"
        if self.data.packing and flash and self.optim.micro_batch_size > 1:
            raise ValueError(
                f"optim.micro_batch_size {self.optim.micro_batch_size}: packing with"
                " flash_attention_2 keeps samples apart in micro-batches of 1 only; take 1, a"
                " longer data.max_seq_len, or model.attn_implementation sdpa"
            )
        return self

    @property
    def registered_name(self) -> str:
        """The name in the model registry: ``<tenant>.<name>``."""
        return f"{self.tenant}.{self.name}"

    def to_yaml(self) -> str:
        """Return the resolved document: every key, in the order of the sections."""
        return yaml.safe_dump(self.to_document(), sort_keys=False)

    def to_document(self) -> dict[str, Any]:
        """Return the resolved document as plain values; reading it gives this run again.

        Every key is in it, but of a run with a parent only what was written of the method: the
        parent decides the rest.
        """
        document = self.model_dump(mode="json")
        if self.registry.parent is not None:
            document["method"] = self.method.model_dump(mode="json", exclude_unset=True)
        return document


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping: YAML's own reader drops the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        problem=f"the key {key.value} stands twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


# A date or number that can't be (2024-13-45, 5,000 digits) is a ValueError of PyYAML, a tag that
# doesn't fit its value one of LookupError or AttributeError, too deep a nesting a RecursionError.
_YAML_FAULTS = (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError)


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a run from a YAML file, with ``section.key=value`` overrides applied in order.

    Raises ConfigError with one fault for every key that is unknown (naming the nearest known),
    missing, of the wrong type or out of range.
    """
    path = Path(path)
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror or error}") from error
    except _YAML_FAULTS as error:
        raise ConfigError(f"{path}: no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: holds {type(document).__name__}, not a mapping of sections")
    for override in overrides or []:
        _apply_override(document, override)
    return parse_config(document, source=str(path))


def parse_config(document: dict[str, Any], source: str = "config") -> RunConfig:
    """Turn a mapping into a run; `source` names it in each fault."""
    try:
        return RunConfig.model_validate(document)
    except ValidationError as error:
        faults = []
        for fault in error.errors():
            cause = fault.get("ctx", {}).get("error")
            if isinstance(cause, ConfigError):  # a section that checks itself
                section = ".".join(map(str, fault["loc"]))
                faults += [f"{source}: {section}.{line}" for line in cause.faults]
            else:
                faults.append(f"{source}: {_describe(fault, RunConfig)}")
        raise ConfigError(*faults) from None


def _apply_override(document: dict[str, Any], override: str) -> None:
    key, sep, text = override.partition("=")
    if not sep or not key:
        raise ConfigError(f"--set {override}: write section.key=value")
    *parents, last = key.split(".")
    section = document
    for parent in parents:
        child = section.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override}: {parent} is a value, not a section")
        section = child
    try:
        value = yaml.safe_load(text)
    except _YAML_FAULTS as error:
        raise ConfigError(f"--set {override}: no valid YAML value: {text!r}") from error
    section[last] = value


def _describe(fault: ErrorDetails, root: type[BaseModel]) -> str:
    kinds = ("int", "str", "[key]", "one", "several")  # of a union or a mapping
    location = [
        str(part)
        for part in fault["loc"]
        if part not in kinds and not str(part).startswith(("constrained-list", "list["))
    ]
    key, value = ".".join(location), fault["input"]
    if fault["type"] == "extra_forbidden":
        known = _known_keys(root, location[:-1])
        nearest = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"known here: {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    if fault["type"] == "missing":
        return f"{key}: is required"
    if fault["type"] == "model_type":
        known = _known_keys(root, location)
        given = "nothing" if value is None else repr(value)
        return f"{key}: holds {given}, not keys; known here: {', '.join(known)}"
    message = fault["msg"].removeprefix("Value error, ")
    if not key:
        return message
    shown = "" if isinstance(value, dict | BaseModel) else f" (got {value!r})"
    return f"{key}: {message[0].lower()}{message[1:]}{shown}"


def _known_keys(root: type[BaseModel], location: list[str]) -> list[str]:
    section = root
    for part in location:
        if part.isdecimal():  # an entry of data.train
            section = WeightedFile
            continue
        annotation = section.model_fields[part].annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            section = annotation
    return list(section.model_fields)
