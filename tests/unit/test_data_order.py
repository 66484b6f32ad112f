"""The shuffle buffer: every row once an epoch, near its place in the file, resumable anywhere."""

import json

import pytest
from data_parts import dataset_of
from hypothesis import given, settings
from hypothesis import strategies as st

from s2ft_ray.config import parse_config
from s2ft_ray.data import TrainLoader
from s2ft_ray.data.order import Permutation, ShuffleBuffer
from s2ft_ray.errors import ConfigError

GROUPS = st.lists(st.tuples(st.integers(1, 30), st.just(1.0)), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(groups=GROUPS, size=st.integers(2, 12), seed=st.integers(0, 2**63 - 1))
def test_every_epoch_has_every_row_once_and_none_before_the_buffer_can_have_it(groups, size, seed):
    order = ShuffleBuffer(seed, groups, size)
    for _ in range(3):
        rows = order.take(order.num_rows)
        assert sorted(rows) == list(range(order.num_rows))
        if len(groups) == 1:  # read in its own order
            assert all(row < place + size for place, row in enumerate(rows))


@settings(max_examples=60, deadline=None)
@given(
    groups=st.lists(
        st.tuples(st.integers(1, 20), st.sampled_from([0.25, 1.0, 1.5])), min_size=1, max_size=3
    ),
    size=st.integers(2, 12),
    before=st.integers(0, 80),
)
def test_a_saved_buffer_goes_on_with_the_same_rows(groups, size, before):
    order, resumed = (ShuffleBuffer(7, groups, size) for _ in range(2))
    order.take(before)
    resumed.load_state_dict(json.loads(json.dumps(order.state_dict())))
    assert resumed.take(50) == order.take(50)


def test_a_weight_is_the_passes_over_a_file_in_an_epoch():
    order = ShuffleBuffer(0, [(8, 1.0), (4, 0.5), (2, 2.0)], 4)
    rows = order.take(2 * order.num_rows)
    counts = [rows.count(row) for row in range(14)]
    assert counts == [2] * 8 + [1] * 4 + [4] * 2


def test_files_are_read_side_by_side():
    rows = ShuffleBuffer(0, [(100, 1.0), (100, 1.0)], 2).take(40)
    assert 18 <= sum(row < 100 for row in rows) <= 22
    assert max(row % 100 for row in rows) < 25


def test_the_buffer_mixes_and_depends_on_seed_and_epoch():
    orders = [ShuffleBuffer(seed, [(200, 1.0)], 50) for seed in (0, 1)]
    made = [tuple(order.take(200)) for order in (*orders, orders[0])]
    assert len(set(made)) == 3
    moved = [abs(row - place) for place, row in enumerate(made[0])]
    assert sum(moved) / len(moved) > 20


def test_ranks_share_the_rows_and_a_resume_on_another_number_of_them_loses_none():
    dataset = dataset_of(30)

    def loader(rank: int, world_size: int) -> TrainLoader:
        return TrainLoader(
            dataset, global_batch_size=10, micro_batch_size=5, rank=rank, world_size=world_size,
            seed=3, pad_id=0, shuffle_buffer=6,
        )  # fmt: skip

    alone, pair = loader(0, 1), [loader(rank, 2) for rank in range(2)]
    first = alone.next_step().lines
    assert [line for rank in pair for line in rank.next_step().lines] == first
    for rank in pair:
        rank.load_state_dict(json.loads(json.dumps(alone.state_dict())))
    rest = [line for _ in range(2) for rank in pair for line in rank.next_step().lines]
    assert sorted(first + rest) == list(range(1, 31))


def test_a_permutation_needs_its_position_alone():
    order = Permutation(0, [(9, 1.0)])
    order.take(13)
    assert order.state_dict() == {"position": 13}


def test_packing_with_a_buffer_is_refused():
    data = {"train": "rows.jsonl", "packing": True, "shuffle_buffer": 100}
    with pytest.raises(ConfigError, match="shuffle_buffer with packing"):
        parse_config({"tenant": "acme", "name": "bot", "data": data})
