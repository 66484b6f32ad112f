"""A run's data, ready to train on: prepared once by the driver, loaded by every worker.

Invariant: what ``load`` gives is what ``prepare_data`` made. Workers touch neither the source
file nor the chat template, so they can't disagree about a row.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import datasets
import numpy as np
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from s2ft_ray.config import DataConfig
from s2ft_ray.data.encoding import Encoder
from s2ft_ray.data.formats import bos_ids
from s2ft_ray.data.location import open_source
from s2ft_ray.data.order import Group
from s2ft_ray.data.token_counts import count_tokens
from s2ft_ray.data.validation import Faults, ValidatedFile, validate_file
from s2ft_ray.errors import DataError

HELD_OUT_SHARE = 0.05
MAX_HELD_OUT = 512
NUM_EVAL_PROMPTS = 16
SPLIT_STREAM = 1
"""Keeps this draw apart from those of the epochs, which are seeded by 2-tuples."""


@dataclass(frozen=True)
class Source:
    """A file that rows came from."""

    path: str
    sha256: str
    num_rows: int
    """Rows that can be trained on."""
    train_rows: int = 0
    """Of them, those that are: not held out. The training rows lie file after file."""
    weight: float = 1.0


@dataclass(frozen=True)
class DataReport:
    """What the files hold; token figures are of the training rows."""

    format: str
    sources: list[Source]
    digest: str
    """sha256 of the file; of the files' digests in hex, joined, where there are two."""
    rows: int
    eval_rows: int
    dropped: int
    """Faulty rows left out, over all files."""
    dropped_rows: list[str]
    """What was wrong with the first of them."""
    truncated: int
    """Rows cut to max_seq_len, over all files."""
    tokens: int
    target_tokens: int
    tokens_p50: int
    tokens_p99: int
    tokens_max: int
    notes: list[str]
    """What is no fault but should be known, one line each."""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-able values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read what ``to_dict`` wrote."""
        return cls(**{**values, "sources": [Source(**source) for source in values["sources"]]})


@dataclass(frozen=True)
class EvalPrompt:
    """A held-out row to answer: its prompt and the answer that the file has."""

    prompt: str
    """As text, to be shown; a chat's with its special tokens."""
    expected: str
    input_ids: list[int]
    """The prompt's tokens exactly as in training: what the model is to be given."""


@dataclass(frozen=True)
class PreparedData:
    """Encoded rows (columns input_ids, target_mask, prompt_len, line) and a report on them."""

    train: Dataset
    eval: Dataset
    eval_prompts: list[EvalPrompt]
    report: DataReport

    @property
    def groups(self) -> list[Group]:
        """The training rows of each file, in their order, and the file's weight."""
        return [(one.train_rows, one.weight) for one in self.report.sources if one.train_rows]

    def longest(self) -> int:
        """Count the tokens of the longest row, those held out included."""
        masks = ["target_mask", "rejected_mask"][: 2 if self.report.format == "preference" else 1]
        held_out = [int(count_tokens(self.eval, mask)[0].max()) for mask in masks]
        return max(self.report.tokens_max, *held_out)

    def save(self, folder: str | Path) -> None:
        """Write everything below `folder`."""
        folder = Path(folder)
        with _no_progress_bars():
            self.train.save_to_disk(folder / "train")
            self.eval.save_to_disk(folder / "eval")
        prompts = [dataclasses.asdict(prompt) for prompt in self.eval_prompts]
        _write_json(folder / "eval_prompts.json", prompts)
        _write_json(folder / "report.json", self.report.to_dict())

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what ``save`` wrote; rows stay on disk, mapped into memory."""
        folder = Path(folder)
        try:
            report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
            prompts = json.loads((folder / "eval_prompts.json").read_text(encoding="utf-8"))
            return cls(
                train=datasets.load_from_disk(folder / "train"),
                eval=datasets.load_from_disk(folder / "eval"),
                eval_prompts=[EvalPrompt(**prompt) for prompt in prompts],
                report=DataReport.from_dict(report),
            )
        except (OSError, ValueError) as error:
            raise DataError(f"{folder}: holds no complete prepared data: {error}") from error


def prepare_data(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    cache: Path | None = None,
) -> PreparedData:
    """Validate every row of every file, encode them, hold rows out where no eval file is named.

    `tokenizer` carries the chat template that is to be used; `cache` is the folder of encoded
    files, without one they are kept in memory. Raises DataError with every file's
    faults together, ConfigError where the config or the tokenizer can't do this data.
    """
    encoder = Encoder(
        tokenizer,
        max_seq_len=config.max_seq_len,
        train_on=config.train_on,
        weight_key=config.weight_key,
    )
    faults = Faults()
    files, fatal = _validate_files(config, encoder, faults, cache)
    if fatal or (faults.num_rows and config.invalid_rows == "error"):
        raise DataError(*faults.shown, *fatal, *_summarize(faults, config))
    empty = [_describe_empty(file) for file in files if not len(file.rows)]
    if empty:
        raise DataError(*faults.shown, *empty)
    train, held_out, counts = _split(files, config, seed)
    weights = [file.weight for file in config.train_files]
    return PreparedData(
        train=train,
        eval=held_out,
        eval_prompts=_eval_prompts(held_out, tokenizer),
        report=_report(
            _sources(files, counts, weights),
            files,
            train,
            held_out,
            faults,
            _find_notes(train, tokenizer, config),
        ),
    )


def _validate_files(
    config: DataConfig, encoder: Encoder, faults: Faults, cache: Path | None
) -> tuple[list[ValidatedFile], list[str]]:
    """Validate the files to train on, then the held-out one where there is one."""
    files: list[ValidatedFile] = []
    fatal: list[str] = []
    named = [("data.train", file.path) for file in config.train_files]
    if config.eval is not None:
        named.append(("data.eval", config.eval))
    for key, path in named:
        known = files[0].format if files else None
        try:
            source = open_source(path, key)
            files.append(validate_file(source, encoder, known or config.format, faults, cache))
        except DataError as error:
            fatal += error.faults
    return files, fatal


def _summarize(faults: Faults, config: DataConfig) -> list[str]:
    if not faults.num_rows:
        return []
    hidden = faults.num_faults - len(faults.shown)
    more = f"and {hidden} more faults; " if hidden else ""
    is_one = faults.num_rows == 1
    rows, them = ("1 row is", "it") if is_one else (f"{faults.num_rows} rows are", "them")
    drop = (
        ""
        if config.invalid_rows == "drop"
        else (f", or leave {them} out with data.invalid_rows: drop")
    )
    return [f"{more}{rows} faulty; mend {them}{drop}"]


def _describe_empty(file: ValidatedFile) -> str:
    if file.num_read:
        return f"{file.path}: all of its {file.num_read} rows are faulty; mend some of them"
    return f"{file.path}: is empty; it needs at least one row"


def _split(
    files: list[ValidatedFile], config: DataConfig, seed: int
) -> tuple[Dataset, Dataset, list[int]]:
    """Return the rows to train on, the held-out ones, and how many of the first each file has."""
    if config.eval is not None:
        return _join(files[:-1]), files[-1].rows, [len(file.rows) for file in files[:-1]]
    rows = _join(files)
    if len(rows) < 2:
        raise DataError(
            f"{files[0].path}: has 1 row, and one must be held out for evaluation;"
            " add rows, or name a file of held-out rows in data.eval"
        )
    count = count_held_out(len(rows))
    order = np.random.default_rng((seed, 0, SPLIT_STREAM)).permutation(len(rows))
    kept = np.sort(order[count:])
    ends = np.cumsum([len(file.rows) for file in files])
    counts = np.diff(np.searchsorted(kept, ends), prepend=0).tolist()
    return rows.select(kept), rows.select(np.sort(order[:count])), counts


def _join(files: list[ValidatedFile]) -> Dataset:
    return files[0].rows if len(files) == 1 else concatenate_datasets([f.rows for f in files])


def count_held_out(num_rows: int) -> int:
    """Return how many of so many rows are held out."""
    return min(MAX_HELD_OUT, max(1, round(num_rows * HELD_OUT_SHARE)))


def _eval_prompts(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[EvalPrompt]:
    """Cut the first rows where the answer begins; a text row, which has no prompt, halfway."""
    prompts = []
    for row in rows.select(range(min(NUM_EVAL_PROMPTS, len(rows)))):
        ids = row["input_ids"]
        cut = row["prompt_len"] if row["prompt_len"] > 1 else max(1, len(ids) // 2)
        skipped = 1 if ids[0] == tokenizer.bos_token_id else 0
        text = tokenizer.decode(ids[skipped:cut], clean_up_tokenization_spaces=False)
        answer = tokenizer.decode(ids[cut:], skip_special_tokens=True)
        prompts.append(EvalPrompt(text, answer.strip(), ids[:cut]))
    return prompts


def _find_notes(rows: Dataset, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> list[str]:
    """Look at what a chat template did to the first row that was not cut."""
    whole = (ids for ids in rows["input_ids"] if len(ids) < config.max_seq_len)
    ids = next(whole, None)
    if ids is None:
        return []
    notes = []
    if ids[:1] != bos_ids(tokenizer) != []:
        notes.append(
            f"the chat template doesn't write {tokenizer.bos_token}, which the tokenizer puts"
            " before other texts; if the base was trained with it, let the template begin with it"
        )
    if ids[-1] != tokenizer.eos_token_id:
        notes.append(
            f"the chat template doesn't end an answer with {tokenizer.eos_token}, the tokenizer's"
            " end token: generation won't stop by itself unless it knows the template's own"
        )
    return notes


def _sources(files: list[ValidatedFile], counts: list[int], weights: list[float]) -> list[Source]:
    more = len(files) - len(counts)  # the held-out file
    parts = zip(files, [*counts, *[0] * more], [*weights, *[1.0] * more], strict=True)
    return [Source(f.path, f.sha256, len(f.rows), count, weight) for f, count, weight in parts]


def _report(
    sources: list[Source],
    files: list[ValidatedFile],
    train: Dataset,
    held_out: Dataset,
    faults: Faults,
    notes: list[str],
) -> DataReport:
    lengths, targets = count_tokens(train)
    if files[0].format == "preference":  # each row is two sequences
        others = count_tokens(train, "rejected_mask")
        lengths, targets = (
            np.concatenate([lengths, others[0]]),
            np.concatenate([targets, others[1]]),
        )
    p50, p99 = np.percentile(lengths, [50, 99], method="higher")
    digests = [file.sha256 for file in files]
    joined = hashlib.sha256("".join(digests).encode()).hexdigest()
    return DataReport(
        format=str(files[0].format),
        sources=sources,
        digest=digests[0] if len(digests) == 1 else joined,
        rows=len(train),
        eval_rows=len(held_out),
        dropped=faults.num_rows,
        dropped_rows=faults.shown,
        truncated=sum(file.num_truncated for file in files),
        tokens=int(lengths.sum()),
        target_tokens=int(targets.sum()),
        tokens_p50=int(p50),
        tokens_p99=int(p99),
        tokens_max=int(lengths.max()),
        notes=notes,
    )


def _write_json(path: Path, value: Any) -> None:
    """Write `path` in one piece: a report that is there is whole."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep the job's log to the job's own progress line."""
    if datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
