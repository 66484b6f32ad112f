"""The order in which rows are trained on, shared out over workers, and a position in it.

The stream is endless (see ``order``): epoch after epoch, laid end to end. A step takes the next
``global_batch_size`` rows, rank r the r-th contiguous part of them, in micro-batches. Where the
workers don't divide the micro-batches of a step, the first ranks have one more, and the others an
empty one: all make the same number of passes.

Invariant: which rows a step has does not depend on the world size, none is lost or repeated
within an epoch, and the state says what comes next, whatever the number of workers then. Under
packing a "row" of the stream is a packed sequence.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset
from torch import Tensor

from s2ft_ray.config import OptimConfig
from s2ft_ray.data.batches import MicroBatch, Sample, build_micro_batch
from s2ft_ray.data.order import Group, Order, Permutation, ShuffleBuffer, num_drawn
from s2ft_ray.data.packing import pack_rows
from s2ft_ray.data.token_counts import count_tokens
from s2ft_ray.errors import CheckpointError

MIN_CALIBRATION_ROWS = 32


@dataclass(frozen=True)
class Step:
    """One rank's part of an optimizer step."""

    micro_batches: list[MicroBatch | None]
    num_targets: int
    """Targets of the whole step, over all ranks."""
    normalizer: float
    """What the summed loss is divided by: the targets, each times its row's weight, or the pairs
    of preferences; of the whole step too."""
    lines: list[int]
    """Lines in the data file of this rank's rows."""
    files: list[int]
    """Which file each of them is from, counted from 0."""


def num_steps(config: OptimConfig, num_rows: int) -> int:
    """Return the optimizer steps of a run over `num_rows` rows (sequences, if packed)."""
    if config.max_steps is not None:
        return config.max_steps
    epochs = Fraction(str(config.epochs))  # as it was written: 0.1 is a tenth
    return math.ceil(epochs * num_rows / config.global_batch_size)


def num_sequences(
    dataset: Dataset, packing: int | None, seed: int, groups: Sequence[Group] | None = None
) -> int:
    """Return the rows (packed sequences) of one epoch of a ``TrainLoader`` with these arguments."""
    groups = groups or [(len(dataset), 1.0)]
    if packing is None:
        return sum(map(num_drawn, groups))
    packed = _pack_groups(count_tokens(dataset)[0], packing, seed, groups)
    return sum(
        num_drawn((len(group), weight)) for group, (_, weight) in zip(packed, groups, strict=True)
    )


def _pack_groups(
    lengths: npt.NDArray[np.int64], packing: int, seed: int, groups: Sequence[Group]
) -> list[list[list[int]]]:
    """Pack the rows of each group by themselves."""
    packed, start = [], 0
    for count, _ in groups:
        sequences = pack_rows(lengths[start : start + count], packing, seed)
        packed.append([[start + row for row in sequence] for sequence in sequences])
        start += count
    return packed


class TrainLoader:
    """The training stream as one rank sees it; see the module's docstring.

    `dataset` has the columns input_ids, target_mask and line. `packing` is the longest packed
    sequence in tokens; None: one row is one sequence. `shuffle_buffer` mixes the rows by a buffer
    of so many instead of a permutation of all.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        pad_id: int,
        packing: int | None = None,
        groups: Sequence[Group] | None = None,
        shuffle_buffer: int | None = None,
    ) -> None:
        if global_batch_size % micro_batch_size:
            raise ValueError(
                f"global_batch_size {global_batch_size} is no multiple of micro_batch_size"
                f" {micro_batch_size}"
            )
        self._dataset = dataset
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._rank = rank
        self._world_size = world_size
        self._seed = seed
        self._pad_id = pad_id
        lengths, self._targets = count_tokens(dataset)
        self._is_paired = is_paired(dataset)
        self._weights = read_weights(dataset)
        groups = list(groups or [(len(dataset), 1.0)])
        self._file_ends = np.cumsum([count for count, _ in groups])
        self._sequences: list[list[int]] | None = None
        if packing is not None:
            packed = _pack_groups(lengths, packing, seed, groups)
            self._sequences = [sequence for group in packed for sequence in group]
            weights = [weight for _, weight in groups]
            groups = [(len(g), weight) for g, weight in zip(packed, weights, strict=True)]
        self._num_taken = 0
        self._order: Order = (
            Permutation(seed, groups)
            if shuffle_buffer is None
            else ShuffleBuffer(seed, groups, shuffle_buffer)
        )

    @property
    def num_rows(self) -> int:
        """Rows (packed sequences) in one epoch: what ``num_steps`` wants."""
        return self._order.num_rows

    def next_step(self) -> Step:
        """Return this rank's part of the next step and move on."""
        drawn = self._order.take(self._global_batch_size)
        step = [[row] if self._sequences is None else self._sequences[row] for row in drawn]
        begin = self._num_taken
        self._num_taken += self._global_batch_size
        first, last = self._share()
        mine = _read(self._dataset, step[first:last])
        size = self._micro_batch_size
        place = (begin + first) // size
        micro_batches: list[MicroBatch | None] = [
            build_micro_batch(_rows(mine[start : start + size]), self._pad_id, place + number)
            for number, start in enumerate(range(0, len(mine), size))
        ]
        passes = -(-self._global_batch_size // (self._micro_batch_size * self._world_size))
        rows = [row for sequence in step for row in sequence]
        num_targets = int(self._targets[rows].sum())
        weighted = float((self._targets[rows] * self._weights[rows]).sum())
        return Step(
            micro_batches=micro_batches + [None] * (passes - len(micro_batches)),
            num_targets=num_targets,
            normalizer=float(len(step)) if self._is_paired else weighted,
            lines=[sequence[0].line for sequence in mine]
            if self._is_paired
            else [sample.line for sequence in mine for sample in sequence],
            files=[
                int(np.searchsorted(self._file_ends, row, side="right"))
                for sequence in step[first:last]
                for row in sequence
            ],
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the stream, and what it is a place in."""
        return {**self._order.state_dict(), "num_rows": self.num_rows, "seed": self._seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved place; the batch and world sizes may have changed, the data not."""
        mine = self.state_dict()
        for key in ("num_rows", "seed"):
            if state[key] != mine[key]:
                raise CheckpointError(
                    f"the checkpoint's data stream has {key} {state[key]}, this run's {mine[key]};"
                    " resume with the data and the seed of the run"
                )
        self._order.load_state_dict(state)
        self._num_taken = int(state["position"])

    def _share(self) -> tuple[int, int]:
        """Return this rank's range of a step's rows: whole micro-batches."""
        each, more = divmod(self._global_batch_size // self._micro_batch_size, self._world_size)
        first = self._rank * each + min(self._rank, more)
        last = first + each + (self._rank < more)
        return first * self._micro_batch_size, last * self._micro_batch_size


def eval_batches(
    dataset: Dataset, micro_batch_size: int, rank: int, world_size: int, pad_id: int
) -> list[MicroBatch | None]:
    """Return this rank's micro-batches of all rows in order: batch i belongs to rank i mod world.

    Every rank gets the same number; None where the rows have run out. Weights don't count.
    """
    if "weight" in dataset.column_names:
        dataset = dataset.remove_columns("weight")
    starts = range(0, len(dataset), micro_batch_size)
    batches: list[MicroBatch | None] = []
    for first in range(0, len(starts), world_size):
        if first + rank >= len(starts):
            batches.append(None)
            continue
        start = starts[first + rank]
        rows = range(start, min(start + micro_batch_size, len(dataset)))
        batches.append(build_micro_batch(_rows(_read(dataset, [[row] for row in rows])), pad_id))
    return batches


def calibration_batches(
    dataset: Dataset, share: float, batch_size: int, pad_id: int
) -> Iterator[dict[str, Tensor]]:
    """Yield rows of the data as a Hugging Face model takes them, for every rank the same.

    They are a `share` of all rows, at least 32, evenly spaced and padded on the right.
    """
    count = min(len(dataset), max(MIN_CALIBRATION_ROWS, round(share * len(dataset))))
    rows = [index * len(dataset) // count for index in range(count)]
    for start in range(0, count, batch_size):
        read = _read(dataset, [[row] for row in rows[start : start + batch_size]])
        samples = [sequence[0] for sequence in read]  # of a pair the chosen one
        batch = build_micro_batch([[sample] for sample in samples], pad_id)
        lengths = torch.tensor([len(sample.input_ids) for sample in samples])
        mask = torch.arange(batch.input_ids.shape[1]) < lengths.unsqueeze(1)
        yield {
            "input_ids": batch.input_ids,
            "attention_mask": mask.long(),
            "labels": batch.labels,
        }


def is_paired(dataset: Dataset) -> bool:
    """Return whether the rows are pairs of answers."""
    return "rejected_ids" in dataset.column_names and bool(dataset[0]["rejected_ids"])


def read_weights(dataset: Dataset) -> npt.NDArray[np.float64]:
    """Return the weight of each row."""
    if "weight" not in dataset.column_names:
        return np.ones(len(dataset))
    weights = dataset.select_columns("weight").with_format("numpy")[:]["weight"]
    return np.asarray(weights, dtype=np.float64)


def _rows(sequences: list[list[Sample]]) -> list[list[Sample]]:
    """Lay out a micro-batch: a sequence is a row; a pair is two, the chosen answer first."""
    is_pair = len(sequences[0]) == 2 and sequences[0][1].is_rejected
    return [[sample] for pair in sequences for sample in pair] if is_pair else sequences


def _read(dataset: Dataset, sequences: list[list[int]]) -> list[list[Sample]]:
    columns = dataset[[row for sequence in sequences for row in sequence]]
    weights = columns.get("weight") or [1.0] * len(columns["line"])
    samples = map(Sample, columns["input_ids"], columns["target_mask"], columns["line"], weights)
    read = [list(itertools.islice(samples, len(sequence))) for sequence in sequences]
    if not any(columns.get("rejected_ids", [])):
        return read
    others = zip(columns["rejected_ids"], columns["rejected_mask"], columns["line"], strict=True)
    pairs = [
        (sample, Sample(*other, is_rejected=True))
        for (sample,), other in zip(read, others, strict=True)
    ]
    return [list(pair) for pair in pairs]
