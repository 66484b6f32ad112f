"""The training stream: every row once an epoch, the same for any world size, resumable."""

from collections import Counter

import pytest
import torch
from data_parts import dataset_of
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from s2ft_ray.config import OptimConfig
from s2ft_ray.data import IGNORE_INDEX, TrainLoader, eval_batches, num_sequences, num_steps
from s2ft_ray.errors import CheckpointError


def loader_of(
    dataset, *, rank=0, world_size=1, batch=8, micro=2, seed=0, packing=None, groups=None
):
    return TrainLoader(
        dataset,
        global_batch_size=batch,
        micro_batch_size=micro,
        rank=rank,
        world_size=world_size,
        seed=seed,
        pad_id=0,
        packing=packing,
        groups=groups,
    )


def assert_equal_steps(step, other) -> None:
    assert (step.num_targets, step.lines) == (other.num_targets, other.lines)
    for batch, expected in zip(step.micro_batches, other.micro_batches, strict=True):
        for name in ("input_ids", "labels", "position_ids"):
            assert torch.equal(getattr(batch, name), getattr(expected, name))


@settings(max_examples=20, deadline=None)
@given(
    num_rows=st.integers(1, 40),
    micro=st.integers(1, 3),
    accumulation=st.integers(1, 2),
    seed=st.integers(0, 2**63 - 1),
    packing=st.sampled_from([None, 8, 17]),
)
def test_the_ranks_share_the_same_rows_whatever_the_world_size(
    num_rows, micro, accumulation, seed, packing
):
    dataset = dataset_of(num_rows)
    batch = 4 * micro * accumulation
    alone = loader_of(dataset, batch=batch, micro=micro, seed=seed, packing=packing)
    worlds = {
        size: [
            loader_of(
                dataset,
                rank=rank,
                world_size=size,
                batch=batch,
                micro=micro,
                seed=seed,
                packing=packing,
            )
            for rank in range(size)
        ]
        for size in (2, 3, 4, 5)
    }
    for _ in range(3):
        step = alone.next_step()
        assert step.num_targets == sum(b.num_targets for b in step.micro_batches)
        for size, loaders in worlds.items():
            parts = [loader.next_step() for loader in loaders]
            assert [line for part in parts for line in part.lines] == step.lines
            assert {part.num_targets for part in parts} == {step.num_targets}
            passes = -(-batch // (micro * size))
            assert {len(part.micro_batches) for part in parts} == {passes}
            real = [b for part in parts for b in part.micro_batches if b is not None]
            assert len(real) == batch // micro
            assert sum(b.num_targets for b in real) == step.num_targets


@settings(max_examples=20, deadline=None)
@given(
    num_rows=st.integers(1, 40),
    epochs=st.integers(1, 4),
    batch=st.integers(1, 12),
    packing=st.sampled_from([None, 8, 17]),
)
def test_every_epoch_has_every_row_once(num_rows, epochs, batch, packing):
    loader = loader_of(dataset_of(num_rows), batch=batch, micro=1, packing=packing)
    assert loader.num_rows == num_sequences(dataset_of(num_rows), packing, 0)
    stream: list[list[int]] = []
    while len(stream) < loader.num_rows * epochs:
        stream += [
            sorted({int(token) - 100 for token in b.input_ids.flatten() if token})
            for b in loader.next_step().micro_batches
        ]
    for epoch in range(epochs):
        rows = stream[epoch * loader.num_rows : (epoch + 1) * loader.num_rows]
        assert Counter(row for sequence in rows for row in sequence) == Counter(range(num_rows))


@settings(max_examples=20, deadline=None)
@given(
    num_rows=st.integers(1, 30),
    before=st.integers(0, 12),
    packing=st.sampled_from([None, 8]),
)
def test_a_resumed_stream_goes_on_where_it_stopped(num_rows, before, packing):
    dataset = dataset_of(num_rows)
    loader = loader_of(dataset, packing=packing)
    for _ in range(before):
        loader.next_step()
    resumed = loader_of(dataset, packing=packing)
    resumed.load_state_dict(loader.state_dict())
    for _ in range(5):
        assert_equal_steps(resumed.next_step(), loader.next_step())


def test_a_resume_with_another_world_and_batch_size_loses_no_row():
    dataset = dataset_of(30)
    loader = loader_of(dataset, batch=8)
    lines = [line for _ in range(2) for line in loader.next_step().lines]
    ranks = [loader_of(dataset, rank=r, world_size=2, batch=14, micro=7) for r in range(2)]
    for rank in ranks:
        rank.load_state_dict(loader.state_dict())
        lines += rank.next_step().lines
    assert sorted(lines) == list(range(1, 31))


def test_the_order_depends_on_seed_and_epoch():
    dataset = dataset_of(40)
    first, other = loader_of(dataset, batch=40), loader_of(dataset, batch=40, seed=1)
    orders = [first.next_step().lines, first.next_step().lines, other.next_step().lines]
    assert all(sorted(order) == list(range(1, 41)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3


def test_the_state_of_other_data_is_refused():
    state = loader_of(dataset_of(10)).state_dict()
    with pytest.raises(CheckpointError, match="has num_rows 10, this run's 11; resume with the"):
        loader_of(dataset_of(11)).load_state_dict(state)
    with pytest.raises(CheckpointError, match="has seed 0, this run's 3"):
        loader_of(dataset_of(10), seed=3).load_state_dict(state)


def test_a_batch_that_the_ranks_cant_share_is_refused():
    with pytest.raises(ValueError, match="global_batch_size 8 is no multiple of micro_batch_size"):
        loader_of(dataset_of(4), batch=8, micro=3)


def test_labels_are_the_tokens_of_the_targets():
    dataset = Dataset.from_dict(
        {
            "input_ids": [[5, 6, 7], [8, 9]],
            "target_mask": [[False, False, True], [True, True]],
            "line": [3, 4],
        }
    )
    (batch,) = eval_batches(dataset, 2, rank=0, world_size=1, pad_id=1)
    assert batch is not None
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 9, 1]]
    assert batch.labels.tolist() == [
        [IGNORE_INDEX, IGNORE_INDEX, 7],
        [IGNORE_INDEX, 9, IGNORE_INDEX],
    ]
    assert batch.position_ids.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert (batch.num_targets, batch.num_tokens, batch.attention_mask) == (2, 5, None)
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64


def test_padding_reaches_to_the_longest_row_of_the_micro_batch():
    step = loader_of(dataset_of(8)).next_step()
    for batch in step.micro_batches:
        lengths = (batch.input_ids != 0).sum(dim=1)
        assert batch.input_ids.shape[1] == lengths.max()


@settings(max_examples=20, deadline=None)
@given(num_rows=st.integers(1, 20), micro=st.integers(1, 4), world_size=st.sampled_from([1, 2, 4]))
def test_evaluation_covers_every_row_once_with_as_many_batches_on_each_rank(
    num_rows, micro, world_size
):
    dataset = dataset_of(num_rows)
    ranks = [eval_batches(dataset, micro, rank, world_size, pad_id=0) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    firsts = [
        int(token)
        for batches in ranks
        for batch in batches
        if batch is not None
        for token in batch.input_ids[:, 0]
    ]
    assert sorted(firsts) == [100 + i for i in range(num_rows)]


@pytest.mark.parametrize(
    ("length", "num_rows", "steps"),
    [
        ({"epochs": 1}, 16, 1),
        ({"epochs": 1}, 17, 2),
        ({"epochs": 3}, 3234, 607),
        ({"epochs": 0.1}, 480, 3),
        ({"epochs": 0.7}, 160, 7),  # 0.7 * 160 / 16 is 7.000000000000001 in floats
        ({"epochs": 0.001}, 10, 1),
        ({"max_steps": 260}, 3, 260),
        ({}, 16, 3),
    ],
)
def test_num_steps_rounds_up_what_was_asked_for(length, num_rows, steps):
    assert num_steps(OptimConfig(global_batch_size=16, **length), num_rows) == steps


@settings(max_examples=20, deadline=None)
@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    weights=st.lists(st.sampled_from([0.25, 0.5, 1.0, 1.5, 3.0]), min_size=3, max_size=3),
    packing=st.sampled_from([None, 8]),
)
def test_a_weight_is_the_passes_over_a_file_in_an_epoch(counts, weights, packing):
    groups = list(zip(counts, weights, strict=False))
    dataset = dataset_of(sum(counts))
    arguments = {"batch": 1, "micro": 1, "packing": packing, "groups": groups}
    loader = loader_of(dataset, **arguments)
    assert loader.num_rows == num_sequences(dataset, packing, 0, groups)
    epochs = 4  # in which a quarter is a whole pass
    seen: Counter[tuple[int, int]] = Counter()
    resumed = loader_of(dataset, **arguments)
    for number in range(epochs * loader.num_rows):
        if number == loader.num_rows + 1:
            resumed.load_state_dict(loader.state_dict())
        step = loader.next_step()
        if number > loader.num_rows:
            assert_equal_steps(resumed.next_step(), step)
        seen.update(zip(step.files, step.lines, strict=True))
    start = 0
    for number, (count, weight) in enumerate(groups):
        times = [seen[number, line] for line in range(start + 1, start + count + 1)]
        assert max(times) - min(times) <= 1  # in turn
        if packing is None:
            assert sum(times) == epochs * max(1, round(count * weight))
        start += count
