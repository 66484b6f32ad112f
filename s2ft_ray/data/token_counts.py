"""How many tokens and targets each row of an encoded dataset has."""

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
from datasets import Dataset

ROWS_PER_READ = 10_000


def count_tokens(
    dataset: Dataset, mask: str = "target_mask"
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return each row's tokens, and its targets; a first token is never a target.

    `mask` "rejected_mask" counts those of a preference's rejected answer.
    """
    lengths: list[npt.NDArray[np.int64]] = []
    targets: list[npt.NDArray[np.int64]] = []
    for table in dataset.select_columns(mask).with_format("arrow").iter(ROWS_PER_READ):
        masks = table[mask].combine_chunks()
        sizes = pc.list_value_length(masks).to_numpy().astype(np.int64)
        starts = np.cumsum(sizes) - sizes
        flags = masks.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
        lengths.append(sizes)
        targets.append(np.add.reduceat(flags, starts) - flags[starts])
    return np.concatenate(lengths), np.concatenate(targets)
