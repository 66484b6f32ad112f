"""``jobs/benchmark.py`` at tiny sizes: its tables are complete and their arithmetic is right.

Nothing here judges a time: that is what the command is for.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

REPO = Path(__file__).parents[2]
TINY = ["--layers", "2", "--width", "192", "--tokens", "2x16", "--rounds", "1", "--threads", "1"]


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "jobs/benchmark.py", *arguments]
    return subprocess.run(
        command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=500
    )


def rows_of(printed: str) -> list[list[str]]:
    """The cells of every row of every table, without the heads."""
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row[0]]


def best_of(result: dict[str, Any]) -> float:
    """The fastest step of all of a contender's turns."""
    return min(second for turn in result["turns"] for second in turn["seconds"])


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    out = tmp_path_factory.mktemp("benchmark") / "out.json"
    ended = benchmark("train", *TINY, "--dtype", "fp32", "bf16", "--json", str(out))
    assert ended.returncode == 0, ended.stderr
    return ended.stdout, json.loads(out.read_text())


def test_every_contender_is_in_the_table_of_each_dtype(train: tuple[str, dict[str, Any]]) -> None:
    printed, document = train
    fp32, bf16 = ([r["name"] for r in table["results"]] for table in document["tables"])
    assert fp32 == [
        "S2FT o down",
        "limit: frozen weights",
        "LoRA q k v up down",
        "LoRA q k v up down, dropout",
        "LoRA o down",
        "LoRA-FA q k v up down",
        "DoRA q k v up down",
        "DoRA q k v up down, dropout",
        "S2FT o down, permuted",
        "two matmuls o down",
        "full fine-tuning",
    ]
    assert bf16 == [*fp32[:4], "LoRA q k v up down, all bf16", *fp32[4:]]
    rows = rows_of(printed)
    assert [row[0] for row in rows] == fp32 + bf16
    assert all(len(row) == 9 and all(row) for row in rows)


def test_ratios_are_those_of_the_minima(train: tuple[str, dict[str, Any]]) -> None:
    printed, document = train
    rows = iter(rows_of(printed))
    for table in document["tables"]:
        own = table["results"][0]
        for it in table["results"]:
            shown = [float(cell) for cell in next(rows)[6:]]
            seconds = best_of(own) / best_of(it)
            peak, kept = own["peak_bytes"] / it["peak_bytes"], own["kept_bytes"] / it["kept_bytes"]
            assert shown == pytest.approx([seconds, peak, kept], abs=6e-4)
            ratios = it["s2ft_ratio"]
            assert list(ratios.values()) == pytest.approx([seconds, peak, kept])


def test_trainable_parameters_are_equal_to_half_a_rank(
    train: tuple[str, dict[str, Any]],
) -> None:
    width, key_value, channels, layers = 192, 64, 512, 2
    wide = layers * (2 * width + 2 * (width + key_value) + 2 * (width + channels))
    narrow = layers * (2 * width + width + channels)
    ranks = {"LoRA q k v up down": wide, "LoRA o down": narrow, "DoRA q k v up down": wide}
    ranks |= {f"{name}, dropout": wide for name in ranks if "q k v" in name}
    for table in train[1]["tables"]:
        counts = {it["name"]: it["num_trainable"] for it in table["results"]}
        # One head of o, and 3% of 512 channels of down.
        own = layers * width * (64 + 15)
        assert counts["S2FT o down"] == own
        assert counts["limit: frozen weights"] == 0
        assert counts["two matmuls o down"] == own
        assert counts["S2FT o down, permuted"] == own
        outs = layers * (2 * width + 2 * key_value + channels)
        assert abs(counts["LoRA-FA q k v up down"] - own) <= outs / 2
        for name, per_rank in ranks.items():
            assert abs(counts[name] - own) <= per_rank / 2


def test_s2ft_keeps_less_than_lora_and_the_machine_is_named(
    train: tuple[str, dict[str, Any]],
) -> None:
    printed, document = train
    for table in document["tables"]:
        kept = {it["name"]: it["kept_bytes"] for it in table["results"]}
        assert kept["S2FT o down"] < kept["LoRA o down"] < kept["LoRA q k v up down"]
    assert document["machine"]["threads"] == 1
    assert document["machine"]["torch"] == torch.__version__
    assert re.search(r"Llama of 2 layers, 192 wide, .* vocabulary 4096", printed)


@pytest.mark.long
def test_every_layout_is_in_the_mode_table() -> None:
    small = ["--layers", "2", "--width", "64", "--threads", "1", "--rounds", "1"]
    ended = benchmark("sharding", *small, "--workers", "2", "--steps", "4")
    assert ended.returncode == 0, ended.stderr
    rows = {row[0]: row for row in rows_of(ended.stdout)}
    assert {"one worker", "replicate", "full"} <= set(rows)
    for name in ("replicate", "full"):
        assert float(rows[name][1]) < 1e-5
        assert 0.5 < float(rows[name][5]) / float(rows[name][4]) < 2


@pytest.mark.long
def test_checkpoints_are_priced_against_a_run_without() -> None:
    small = ["--layers", "2", "--width", "64", "--threads", "1", "--rounds", "1"]
    ended = benchmark("checkpoints", *small, "--steps", "12", "--every", "3")
    assert ended.returncode == 0, ended.stderr
    assert [row[0] for row in rows_of(ended.stdout)][-2:] == ["none", "every 3 steps"]


class ViewKeeper(nn.Module):
    """Its graph keeps a view of 8 of the 32 columns that it pins, and its result's exponential."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, 4))

    def forward(self, input_ids: Tensor, labels: Tensor) -> SimpleNamespace:
        hidden = input_ids.float().repeat(1, 32)  # [16, 32]
        return SimpleNamespace(loss=(hidden[:, :8] @ self.weight).exp().sum() + labels.sum())


class Allocator(nn.Module):
    """It holds 4 MiB only until the next line."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1 << 18))

    def forward(self, input_ids: Tensor, labels: Tensor) -> SimpleNamespace:
        total = torch.ones(1 << 20).sum()
        return SimpleNamespace(loss=self.weight.sum() * total + input_ids.sum() + labels.sum())


def batch(rows: int) -> dict[str, Tensor]:
    ids = torch.zeros(rows, 1, dtype=torch.int64)
    return {"input_ids": ids, "labels": ids}


@pytest.fixture
def training_step(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(REPO / "jobs")
    from benchmarks.measure import TrainingStep

    return TrainingStep


def test_kept_bytes_count_whole_storages_once_and_no_parameters(training_step: Any) -> None:
    step = training_step(ViewKeeper(), None, batch(16))
    assert step.kept_bytes() == 16 * 32 * 4 + 16 * 4 * 4


def test_peak_bytes_count_what_is_freed_again_and_the_model(training_step: Any) -> None:
    step = training_step(Allocator(), None, batch(1))
    weight, temporary, slack = 1 << 20, 4 << 20, 1 << 12
    # The second step's temporary comes while the first's gradient is held.
    assert 0 <= step.peak_bytes() - (weight + weight + temporary) <= slack


@pytest.mark.long
def test_ray_and_the_plain_loop_are_compared_on_equal_steps(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    size = ["--layers", "1", "--width", "64", "--steps", "6", "--rounds", "1", "--threads", "1"]
    ended = benchmark("ray", *size, "--json", str(out))
    assert ended.returncode == 0, ended.stderr
    document = json.loads(out.read_text())
    plain, in_ray = (document["seconds"][name] for name in ("plain loop", "Ray Train"))
    assert [len(plain), len(in_ray)] == [1, 1]
    assert len(plain[0]) == len(in_ray[0]) == 4  # of 6 steps one is warmup, and 5 have 4 gaps
    ratio = sorted(plain[0])[1:3], sorted(in_ray[0])[1:3]
    assert document["ratio"] == pytest.approx(sum(ratio[0]) / sum(ratio[1]))
    assert [row[0] for row in rows_of(ended.stdout)] == ["plain loop", "Ray Train"]
    assert f"{document['ratio']:.3f}" in ended.stdout
