"""The order in which rows are trained on, shared out over workers, and a position in it.

The stream is endless: epoch after epoch, each a permutation of all rows by (seed, epoch), laid
end to end. A step takes the next ``global_batch_size`` rows, rank r the r-th contiguous part of
them, in micro-batches.

Invariant: which rows a step has does not depend on the world size, none is lost or repeated
within an epoch, and the position (in rows) alone says what comes next. Under packing a "row" of
the stream is a packed sequence.
"""

import itertools
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from datasets import Dataset

from s2ft_ray.config import OptimConfig
from s2ft_ray.data.batches import MicroBatch, Sample, build_micro_batch
from s2ft_ray.data.packing import pack_rows
from s2ft_ray.data.token_counts import count_tokens
from s2ft_ray.errors import CheckpointError


@dataclass(frozen=True)
class Step:
    """One rank's part of an optimizer step."""

    micro_batches: list[MicroBatch]
    num_targets: int
    """Targets of the whole step, over all ranks: what the loss is divided by."""
    lines: list[int]
    """Lines in the data file of this rank's rows."""


def num_steps(config: OptimConfig, num_rows: int) -> int:
    """Return the optimizer steps of a run over `num_rows` rows (sequences, if packed)."""
    if config.max_steps is not None:
        return config.max_steps
    epochs = Fraction(str(config.epochs))  # as it was written: 0.1 is a tenth
    return math.ceil(epochs * num_rows / config.global_batch_size)


def num_sequences(dataset: Dataset, packing: int | None, seed: int) -> int:
    """Return the rows (packed sequences) of one epoch of a ``TrainLoader`` with these arguments."""
    if packing is None:
        return len(dataset)
    return len(pack_rows(count_tokens(dataset)[0], packing, seed))


class TrainLoader:
    """The training stream as one rank sees it; see the module's docstring.

    `dataset` has the columns input_ids, target_mask and line. `packing` is the longest packed
    sequence in tokens; None: one row is one sequence.
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
    ) -> None:
        if global_batch_size % (micro_batch_size * world_size):
            raise ValueError(
                f"global_batch_size {global_batch_size} is no multiple of micro_batch_size"
                f" {micro_batch_size} x world_size {world_size}"
            )
        self._dataset = dataset
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._rank = rank
        self._world_size = world_size
        self._seed = seed
        self._pad_id = pad_id
        lengths, self._targets = count_tokens(dataset)
        self._sequences = pack_rows(lengths, packing, seed) if packing is not None else None
        self._position = 0
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    @property
    def num_rows(self) -> int:
        """Rows (packed sequences) in one epoch: what ``num_steps`` wants."""
        return len(self._targets if self._sequences is None else self._sequences)

    def next_step(self) -> Step:
        """Return this rank's part of the next step and move on."""
        stop = self._position + self._global_batch_size
        step = [self._sequence_at(position) for position in range(self._position, stop)]
        self._position = stop
        share = self._global_batch_size // self._world_size
        mine = _read(self._dataset, step[self._rank * share : (self._rank + 1) * share])
        return Step(
            micro_batches=[
                build_micro_batch(mine[start : start + self._micro_batch_size], self._pad_id)
                for start in range(0, share, self._micro_batch_size)
            ],
            num_targets=sum(int(self._targets[row]) for sequence in step for row in sequence),
            lines=[sample.line for sequence in mine for sample in sequence],
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the position in rows, and what it is a position in."""
        return {"position": self._position, "num_rows": self.num_rows, "seed": self._seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position; the batch and world sizes may have changed, the data not."""
        mine = self.state_dict()
        for key in ("num_rows", "seed"):
            if state[key] != mine[key]:
                raise CheckpointError(
                    f"the checkpoint's data stream has {key} {state[key]}, this run's {mine[key]};"
                    " resume with the data and the seed of the run"
                )
        self._position = int(state["position"])

    def _sequence_at(self, position: int) -> list[int]:
        epoch, index = divmod(position, self.num_rows)
        if epoch != self._epoch:
            generator = np.random.default_rng((self._seed, epoch))
            self._order, self._epoch = generator.permutation(self.num_rows), epoch
        row = int(self._order[index])
        return [row] if self._sequences is None else self._sequences[row]


def eval_batches(
    dataset: Dataset, micro_batch_size: int, rank: int, world_size: int, pad_id: int
) -> list[MicroBatch | None]:
    """Return this rank's micro-batches of all rows in order: batch i belongs to rank i mod world.

    Every rank gets the same number; None where the rows have run out.
    """
    starts = range(0, len(dataset), micro_batch_size)
    batches: list[MicroBatch | None] = []
    for first in range(0, len(starts), world_size):
        if first + rank >= len(starts):
            batches.append(None)
            continue
        start = starts[first + rank]
        rows = range(start, min(start + micro_batch_size, len(dataset)))
        batches.append(build_micro_batch(_read(dataset, [[row] for row in rows]), pad_id))
    return batches


def _read(dataset: Dataset, sequences: list[list[int]]) -> list[list[Sample]]:
    columns = dataset[[row for sequence in sequences for row in sequence]]
    fields = (columns[name] for name in ("input_ids", "target_mask", "line"))
    samples = map(Sample, *fields)
    return [list(itertools.islice(samples, len(sequence))) for sequence in sequences]
