"""The training benchmark's turns: what short calls leave behind, and the ratios made of it."""

from pathlib import Path
from types import ModuleType

import pytest

REPO = Path(__file__).parents[2]
CASE, TIMING = {"case": "fp32", "model": {"layers": 8}}, {"cores": 2, "clock": "wall"}


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(REPO / "jobs")
    from benchmarks import turns

    return turns


def test_a_call_goes_on_from_the_turns_of_earlier_ones(turns: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "turns.jsonl"
    file = turns.TurnFile(path, CASE, TIMING)
    assert file.read() == {}
    file.add_memory(turns.Result("LoRA", 3, 40, 50))
    file.add_turn("LoRA", turns.Turn(1, [0.2, 0.3], 0.0))
    file.add_turn("LoRA", turns.Turn(2, [0.4], None))
    expected = turns.Result("LoRA", 3, 40, 50)
    expected.turns = [turns.Turn(1, [0.2, 0.3], 0.0), turns.Turn(2, [0.4], None)]
    assert turns.TurnFile(path, dict(CASE), dict(TIMING)).read() == {"LoRA": expected}


def test_times_are_one_machines_and_memory_is_everybodys(turns: ModuleType, tmp_path: Path) -> None:
    path, memory = tmp_path / "turns.jsonl", turns.Result("LoRA", 3, None, 50)
    file = turns.TurnFile(path, CASE, TIMING)
    file.add_memory(memory)
    file.add_turn("LoRA", turns.Turn(1, [0.2], 0.0))
    assert turns.TurnFile(path, CASE, {**TIMING, "cores": 4}).read() == {"LoRA": memory}
    assert turns.TurnFile(path, CASE, {**TIMING, "clock": "cpu"}).read() == {"LoRA": memory}
    assert turns.TurnFile(path, {**CASE, "case": "bf16"}, TIMING).read() == {}


def test_times_are_compared_over_shared_rounds_alone(turns: ModuleType) -> None:
    own, other = turns.Result("S2FT", 1, 10, 10), turns.Result("LoRA", 1, 20, 40)
    own.turns = [turns.Turn(1, [0.9, 1.0], 0.0), turns.Turn(2, [0.3], 0.0)]
    other.turns = [turns.Turn(1, [1.8, 2.0], 0.25)]
    assert other.time_ratio(own) == pytest.approx(0.5)  # not 0.3 / 1.8: round 2 was S2FT's alone
    assert (other.kept_ratio(own), other.peak_ratio(own)) == (0.5, 0.25)
    assert turns.describe_rounds([own, other]) == (
        "best of 1 to 2 rounds; other work took at most 25% of the cores in the best turns"
    )


def test_a_missed_target_says_so(turns: ModuleType) -> None:
    own, other = turns.Result("S2FT", 1, 10, 10), turns.Result("LoRA", 1, 20, 40)
    own.turns, other.turns = [turns.Turn(1, [0.9], 0.0)], [turns.Turn(1, [1.0], 0.0)]
    aims = {"LoRA": turns.Target(seconds=0.76, kept_bytes=0.75)}
    last = turns.render([own, other], 1024, aims).splitlines()[-1]
    assert "0.900 (MISSES 0.76) | 0.250 | 0.500 (within 0.75)" in last
