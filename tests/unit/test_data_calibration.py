"""The rows that a selection looks at."""

import pytest
from datasets import Dataset

from s2ft_ray.data import IGNORE_INDEX, calibration_batches


def dataset_of(num_rows: int) -> Dataset:
    """Row i has 2 to 4 tokens, all of them 10 + i; the last one is a target."""
    lengths = [2 + i % 3 for i in range(num_rows)]
    return Dataset.from_dict(
        {
            "input_ids": [[10 + i] * length for i, length in enumerate(lengths)],
            "target_mask": [[False] * (length - 1) + [True] for length in lengths],
            "line": list(range(1, num_rows + 1)),
        }
    )


@pytest.mark.parametrize(
    ("num_rows", "share", "expected"),
    [(5, 0.01, 5), (400, 0.01, 32), (5000, 0.01, 50), (40, 1.0, 40), (400, 0.5, 200)],
)
def test_a_share_of_the_rows_is_taken_and_at_least_32(
    num_rows: int, share: float, expected: int
) -> None:
    batches = list(calibration_batches(dataset_of(num_rows), share, 16, pad_id=0))
    rows = [int(row[0]) - 10 for batch in batches for row in batch["input_ids"]]
    assert len(rows) == len(set(rows)) == expected
    assert rows == sorted(rows)
    assert rows[-1] - rows[0] > 0.9 * num_rows - num_rows / expected  # from all over the data
    assert [len(batch["input_ids"]) for batch in batches[:-1]] == [16] * (len(batches) - 1)


def test_a_batch_is_what_a_model_takes_with_padding_masked() -> None:
    (batch,) = calibration_batches(dataset_of(3), 0.01, 4, pad_id=1)
    assert batch["input_ids"].tolist() == [[10, 10, 1, 1], [11, 11, 11, 1], [12, 12, 12, 12]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    ignored = IGNORE_INDEX
    assert batch["labels"].tolist() == [
        [ignored, 10, ignored, ignored],
        [ignored, ignored, 11, ignored],
        [ignored, ignored, ignored, 12],
    ]
