"""Slices under fully_shard: what is trained over ranks is what one process trains."""

import pytest
import sharded_slices
import torch
from gloo import GlooPool
from sharded_slices import BUDGETS

MODES = ("replicate", "full")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("share", BUDGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_ranks_train_bit_for_bit_what_one_process_trains(
    two: GlooPool, mode: str, share: str, dtype: torch.dtype
) -> None:
    expected = two.run(sharded_slices.train_alone, share, dtype)[0]
    for rank, result in enumerate(two.run(sharded_slices.train, mode, share, dtype)):
        assert result["fingerprint"] == expected["fingerprint"]
        assert list(result["state"]) == list(expected["state"])
        for name, value in expected["state"].items():
            assert torch.equal(result["state"][name], value), name
        assert (result["empty"] > 0) == (share == "single" and rank == 1)


@pytest.mark.parametrize("mode", MODES)
def test_four_ranks_with_uneven_and_empty_shards_agree_to_rounding(
    four: GlooPool, mode: str
) -> None:
    for share in ("uneven", "single"):
        expected = four.run(sharded_slices.train_alone, share, torch.float32)[0]
        results = four.run(sharded_slices.train, mode, share, torch.float32)
        assert len({result["fingerprint"] for result in results}) == 1
        for name, delta in expected["deltas"].items():
            torch.testing.assert_close(
                results[0]["deltas"][name], delta, rtol=1e-4, atol=1e-6, msg=name
            )


@pytest.mark.parametrize("mode", MODES)
def test_an_adapter_is_whole_also_while_parameters_are_gathered(two: GlooPool, mode: str) -> None:
    for expected, found in two.run(sharded_slices.extract_after_evaluation, mode):
        assert found == expected


@pytest.mark.parametrize("mode", MODES)
def test_refresh_reads_sharded_weights(two: GlooPool, mode: str) -> None:
    two.run(sharded_slices.refresh_from_changed_weights, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["transposed", "experts", "permuted"])
def test_two_ranks_train_every_kind_of_weight_as_one_process_does(
    two: GlooPool, mode: str, kind: str
) -> None:
    expected, _ = two.run(sharded_slices.train_kind, kind, None)[0]
    for fingerprint, _ in two.run(sharded_slices.train_kind, kind, mode):
        assert fingerprint == expected
