"""The stages of a run, each of which may be cut short and done again."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from s2ft_ray import registry
from s2ft_ray.bases import load_base_model
from s2ft_ray.config import ModelConfig, S2FTConfig, parse_config
from s2ft_ray.data import PreparedData
from s2ft_ray.errors import CheckpointError, ConfigError
from s2ft_ray.finetune import main as stages
from s2ft_ray.method import Adapter, convert, extract_adapter
from s2ft_ray.training import launch
from s2ft_ray.training.plan import RunPlan, plan_run
from s2ft_ray.training.run_folder import RunFolder, create_run_folder

VERSION = registry.RegisteredVersion("acme.bot", 1, "champion", "f" * 64)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setenv("S2FT_HOME", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    data = {"train": "rows.jsonl"}
    return create_run_folder(parse_config({"tenant": "acme", "name": "bot", "data": data}), "run-1")


def leave_half_an_adapter(run: RunFolder) -> None:
    run.adapter.mkdir()
    (run.adapter / "adapter_model.safetensors").write_bytes(b"whole")  # renamed first


class Diary:
    """In place of a TrackedRun: keeps nothing."""

    run_id = "of-mlflow"

    @classmethod
    def start(cls, *_: Any, **__: Any) -> "Diary":
        return cls()

    def __enter__(self) -> "Diary":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __getattr__(self, _: str) -> Any:
        return lambda *_: {}


@pytest.mark.parametrize("is_whole", [False, True])
def test_a_run_trains_until_its_adapter_is_whole(
    run: RunFolder, is_whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_half_an_adapter(run)
    if is_whole:
        (run.adapter / "adapter_config.json").write_text("{}")
    trained: list[str] = []
    monkeypatch.setattr(launch, "train_with_ray", lambda run, _: trained.append(run.run_id))
    monkeypatch.setattr(registry, "TrackedRun", Diary)
    monkeypatch.setattr(registry, "register_adapter", lambda *_, **__: VERSION)
    monkeypatch.setattr(PreparedData, "load", lambda _: type("Data", (), {"report": None}))
    monkeypatch.setattr(Adapter, "load", lambda _: type("Made", (), {"fingerprint": "f" * 64}))
    assert stages.finish_run(run) == VERSION
    assert trained == ([] if is_whole else ["run-1"])


@pytest.mark.parametrize("is_whole", [False, True])
def test_to_register_what_is_trained_takes_no_cluster(
    run: RunFolder, is_whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_half_an_adapter(run)
    if is_whole:
        (run.adapter / "adapter_config.json").write_text("{}")
    joined: list[str] = []
    monkeypatch.setattr(stages, "_join_cluster", lambda config: joined.append(config.name))
    monkeypatch.setattr(stages, "finish_run", lambda _: VERSION)
    assert stages.main(["--resume", str(run.path)]) == 0
    assert joined == ([] if is_whole else ["bot"])


@pytest.mark.parametrize(
    ("state", "reason", "way_out"),
    [
        ("running", "first step", "goes on by itself"),
        ("failed", "storage", "which failed; `s2ft resume run-1` lets it go on there"),
        ("failed", "run_deadline", None),
        ("cancelled", "cancelled", None),
    ],
)
def test_what_the_queue_can_go_on_with_is_not_resumed_beside_it(
    run: RunFolder,
    state: str,
    reason: str,
    way_out: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ended = None if state == "running" else "2026-01-31T11:00:00+00:00"
    job = {"state": state, "reason": reason, "finished_at": ended}
    queue = type("Queue", (), {"job": staticmethod(lambda _: job)})
    monkeypatch.setattr(stages, "_join_queue", lambda: queue)
    monkeypatch.setattr(stages, "_join_cluster", lambda _: None)
    monkeypatch.setattr(stages, "finish_run", lambda _: VERSION)
    assert stages.main(["--resume", str(run.path)]) == (0 if way_out is None else 2)
    assert (way_out or "") in capsys.readouterr().err


@pytest.mark.parametrize("part", ["parent", "data"])
def test_a_run_for_whose_inputs_there_is_no_room_is_one_clear_fault(
    part: str, run: RunFolder
) -> None:
    def save(_: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    full = type("Part", (), {"save": staticmethod(save)})
    parent = type("Parent", (), {"adapter": full, "tags": {}}) if part == "parent" else None
    plan = RunPlan(run.load_config(), full, None, parent, [], 1, None, 1, 1, [])  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"run-2: No space left on device; make room there"):
        stages.create_run(plan, "run-2")


def test_a_file_for_which_there_is_no_room_is_one_clear_fault(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(CheckpointError, match=r"stop\.json: No space left on device; make room"):
        run.request_stop("test")
    assert sorted(path.name for path in run.path.iterdir()) == ["config.yaml"]


def test_the_adapters_that_a_run_avoids_are_kept_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("S2FT_HOME", str(tmp_path / "home"))
    base = load_base_model(ModelConfig())
    convert(base, S2FTConfig())
    other = extract_adapter(base)
    other.save(tmp_path / "other")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "one", "completion": " two"}\n' * 40)
    document = {"tenant": "acme", "name": "bot", "data": {"train": str(rows)}}
    config = parse_config({**document, "registry": {"avoid": [str(tmp_path / "other")]}})
    run = stages.create_run(plan_run(config))
    (kept,) = run.avoided.iterdir()
    assert Adapter.load(kept).fingerprint == other.fingerprint
    assert run.read_json("lineage.json") == {"avoids": str(tmp_path / "other")}
    config = parse_config({**document, "registry": {"avoid": [str(tmp_path / "none")]}})
    with pytest.raises(ConfigError, match=r"holds no adapter_config\.json"):
        plan_run(config)
    both = {"parent": "acme.bot", "avoid": ["acme.other"]}
    with pytest.raises(ConfigError, match="avoid with parent"):
        parse_config({**document, "registry": both})
