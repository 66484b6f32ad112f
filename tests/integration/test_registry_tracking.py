"""Runs recorded in a real MLflow: by its SQLite file, by its server, and while it is away."""

import hashlib
import json
import logging
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric
from registry_parts import (
    Server,
    make_database,
    make_home,
    run_config,
    save_base,
    train_adapter,
    write_points,
)

from s2ft_ray.bases import load_base_model
from s2ft_ray.config import DataConfig, ModelConfig, RunConfig, WeightedFile
from s2ft_ray.data import DataReport
from s2ft_ray.data.prepared import Source
from s2ft_ray.errors import JobError
from s2ft_ray.method import Selection, convert
from s2ft_ray.registry import TrackedRun, deliver_run


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_database(tmp_path_factory.mktemp("database"))


@pytest.fixture
def home(tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return make_home(tmp_path, database, monkeypatch)


@pytest.fixture
def run_folder(home: Path) -> Path:
    folder = home / "runs" / "acme" / "support-bot" / "20260101-000000-abcdef"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def server(home: Path) -> Iterator[Server]:
    server = Server(home)
    yield server
    server.kill()


def config(home: Path, uri: str | None = None) -> RunConfig:
    return run_config(home / "base", tracking={"uri": uri})


def history(client: MlflowClient, run_id: str, key: str) -> list[Metric]:
    return sorted(client.get_metric_history(run_id, key), key=lambda metric: metric.step)


def assert_delivered_once(client: MlflowClient, run_id: str, num_steps: int) -> None:
    points = history(client, run_id, "train/loss")
    assert [(point.step, point.value) for point in points] == [
        (step, 100.0 - step) for step in range(1, num_steps + 1)
    ]


def test_a_run_is_recorded_in_the_homes_sqlite_file(home: Path, run_folder: Path) -> None:
    tracked = TrackedRun.start(config(home), run_folder=run_folder, tags={"job": "raysubmit_1"})
    write_points(run_folder, range(1, 301), lr=0.5, grad_norm=math.inf)
    write_points(run_folder, range(0, 301, 100), kind="eval", token_accuracy=math.nan)
    assert tracked.finish("FINISHED", timeout_s=60)

    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    run = client.get_run(tracked.run_id)
    assert_delivered_once(client, tracked.run_id, 300)
    assert [point.step for point in history(client, tracked.run_id, "eval/loss")] == [
        0,
        100,
        200,
        300,
    ]
    assert run.data.metrics["train/lr"] == 0.5
    assert run.data.metrics["train/grad_norm"] > 1e300
    assert math.isnan(run.data.metrics["eval/token_accuracy"])
    assert run.info.status == "FINISHED"
    assert run.info.start_time < run.info.end_time
    assert client.get_experiment(run.info.experiment_id).name == "s2ft/acme"
    assert run.data.params["optim.lr"] == "0.0002"
    assert run.data.params["method.budgets.down"] == "0.03"
    assert run.data.tags["tenant"] == "acme"
    assert run.data.tags["job"] == "raysubmit_1"
    stored = home / "mlartifacts" / "s2ft-acme" / tracked.run_id / "artifacts" / "config.yaml"
    assert stored.read_text() == config(home).to_yaml()
    assert client.list_artifacts(tracked.run_id, "figures")[0].path == "figures/loss.png"


def test_data_and_deltas_are_recorded(home: Path, run_folder: Path) -> None:
    base = save_base(home / "base")
    parent = train_adapter(base, home / "parent", seed=0)
    adapter = train_adapter(base, run_folder / "adapter", seed=0)
    selection = convert(load_base_model(ModelConfig(name_or_path=str(base))), adapter.config)
    (run_folder / "selection.json").write_text(json.dumps(selection.to_json()))
    digest = hashlib.sha256(b"rows").hexdigest()
    report = DataReport(
        format="chat",
        sources=[
            Source("/data/train.jsonl", digest, 60),
            Source("/data/more.jsonl", "a" * 64, 30),
            Source("/data/held.jsonl", "f" * 64, 10),
        ],
        digest="e" * 64,
        rows=90,
        eval_rows=10,
        dropped=2,
        dropped_rows=["line 3: no"],
        truncated=1,
        tokens=900,
        target_tokens=300,
        tokens_p50=10,
        tokens_p99=20,
        tokens_max=21,
        notes=[],
    )
    write_points(run_folder, range(1, 4))
    files = [WeightedFile(path=name) for name in ("/data/train.jsonl", "/data/more.jsonl")]
    run_of_two = config(home).model_copy(update={"data": DataConfig(train=files)})
    for _ in range(2):  # the second as a resumed job that finds everything done
        with TrackedRun.start(run_of_two, run_folder=run_folder) as tracked:
            tracked.record_data(report)
            tracked.record_adapter(adapter, parent)

    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    run = client.get_run(tracked.run_id)
    inputs = {item.dataset.name: item for item in run.inputs.dataset_inputs}
    assert {name: item.tags[0].value for name, item in inputs.items()} == {
        "train.jsonl": "training",
        "more.jsonl": "training",
        "held.jsonl": "evaluation",
    }
    first = inputs["train.jsonl"].dataset
    assert digest.startswith(first.digest)
    assert digest in first.profile
    assert '"dropped": 2' in first.profile  # counted over all files
    assert inputs["held.jsonl"].dataset.digest == "f" * 36
    for module, part in adapter.slices.items():
        norm = run.data.metrics[f"delta/{module}/norm"]
        assert norm == pytest.approx(float(part.delta.norm()))
        assert run.data.metrics[f"delta/{module}/parent_cosine"] == pytest.approx(1.0)
        assert 0 < run.data.metrics[f"delta/{module}/relative_norm"] < 10
        assert [p.step for p in history(client, tracked.run_id, f"delta/{module}/norm")] == [3]
    figures = {item.path for item in client.list_artifacts(tracked.run_id, "figures")}
    assert figures == {"figures/deltas.png", "figures/loss.png", "figures/selection.png"}
    stored = home / "mlartifacts" / "s2ft-acme" / tracked.run_id / "artifacts" / "selection.json"
    assert Selection.from_json(json.loads(stored.read_text())) == selection
    assert run.data.tags["fingerprint"] == adapter.fingerprint


def test_a_server_that_comes_up_late_gets_everything_once(
    home: Path, run_folder: Path, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "s2ft_ray")
    started = time.monotonic()
    tracked = TrackedRun.start(config(home, server.url), run_folder=run_folder)
    assert time.monotonic() - started < 1
    assert tracked.run_id is None
    write_points(run_folder, range(1, 201))
    started = time.monotonic()
    assert not tracked.flush(2)
    assert time.monotonic() - started < 3
    server.start()
    write_points(run_folder, range(201, 301))
    assert tracked.finish("FINISHED", timeout_s=60)
    client = MlflowClient(server.url)
    assert_delivered_once(client, tracked.run_id, 300)
    assert client.get_run(tracked.run_id).info.status == "FINISHED"
    told = [record.getMessage() for record in caplog.records]
    assert len([line for line in told if "takes nothing now" in line]) == 1
    assert len([line for line in told if "is back after" in line]) == 1


def test_a_server_killed_in_the_middle_gets_everything_once(
    home: Path, run_folder: Path, server: Server
) -> None:
    server.start()
    tracked = TrackedRun.start(config(home, server.url), run_folder=run_folder, interval_s=0.05)
    write_points(run_folder, range(1, 101))
    assert tracked.flush(60)
    for step in range(101, 401):  # killed with a delivery under way
        write_points(run_folder, range(step, step + 1))
        if step == 200:
            server.kill()
        time.sleep(0.005)
    server.start()
    write_points(run_folder, range(401, 501))
    assert tracked.finish("FINISHED", timeout_s=60)
    assert_delivered_once(MlflowClient(server.url), tracked.run_id, 500)


def test_what_could_not_be_delivered_waits_in_the_run_folder(
    home: Path, run_folder: Path, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    tracked = TrackedRun.start(config(home, server.url), run_folder=run_folder)
    write_points(run_folder, range(1, 51))
    started = time.monotonic()
    assert not tracked.finish("FINISHED", timeout_s=1)
    assert time.monotonic() - started < 4
    assert "nothing is lost" in caplog.text
    with pytest.raises(JobError, match=rf"{server.url} can't be used.*s2ft up"):
        deliver_run(config(home, server.url), run_folder)
    server.start()
    run_id = deliver_run(config(home, server.url), run_folder)
    client = MlflowClient(server.url)
    assert_delivered_once(client, run_id, 50)
    assert client.get_run(run_id).info.status == "FINISHED"
    assert deliver_run(config(home, server.url), run_folder) == run_id
    assert_delivered_once(client, run_id, 50)


KILLED_DRIVER = """
import os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from registry_parts import run_config, write_points
from s2ft_ray.registry import TrackedRun

folder = Path({folder!r})
tracked = TrackedRun.start(run_config(folder), run_folder=folder, interval_s=0.01)
write_points(folder, range(1, 61))
assert tracked.flush(60)
write_points(folder, range(61, 81))
os._exit(9)
"""


def test_a_resumed_job_goes_on_in_the_same_mlflow_run(home: Path, run_folder: Path) -> None:
    program = KILLED_DRIVER.format(tests=str(Path(__file__).parent), folder=str(run_folder))
    assert subprocess.run([sys.executable, "-c", program], timeout=200).returncode == 9
    # The second driver resumes at the checkpoint of step 50 and tells steps 51 to 80 again.
    tracked = TrackedRun.start(config(home), run_folder=run_folder)
    write_points(run_folder, range(51, 101))
    assert tracked.finish("FINISHED", timeout_s=60)
    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("s2ft/acme")
    assert len(client.search_runs([experiment.experiment_id])) == 1
    assert_delivered_once(client, tracked.run_id, 100)
    assert client.get_run(tracked.run_id).info.status == "FINISHED"


def test_a_driver_killed_before_it_noted_its_run_finds_it_again(
    home: Path, run_folder: Path
) -> None:
    first = TrackedRun.start(config(home), run_folder=run_folder)
    assert first.finish("KILLED", timeout_s=60)
    (run_folder / "tracking.json").unlink()
    second = TrackedRun.start(config(home), run_folder=run_folder)
    write_points(run_folder, range(1, 4))
    assert second.finish("FINISHED", timeout_s=60)
    assert second.run_id == first.run_id


def test_an_mlflow_that_has_lost_the_run_is_told_all_of_it_again(
    home: Path, run_folder: Path
) -> None:
    first = TrackedRun.start(config(home), run_folder=run_folder)
    write_points(run_folder, range(1, 11))
    assert first.finish("KILLED", timeout_s=60)
    other = config(home, f"sqlite:///{home / 'other.db'}")
    second = TrackedRun.start(other, run_folder=run_folder)
    assert second.finish("FINISHED", timeout_s=60)
    assert second.run_id != first.run_id
    client = MlflowClient(f"sqlite:///{home / 'other.db'}")
    assert_delivered_once(client, second.run_id, 10)
    assert client.get_run(second.run_id).data.params["tenant"] == "acme"


def test_readers_with_and_without_the_server_see_the_same_artifacts(
    home: Path, run_folder: Path, server: Server
) -> None:
    server.start()
    with TrackedRun.start(config(home, server.url), run_folder=run_folder) as tracked:
        write_points(run_folder, range(1, 4))
    for uri, name in ((server.url, "served"), (server.database, "direct")):
        (home / name).mkdir()
        stored = MlflowClient(uri).download_artifacts(tracked.run_id, "", str(home / name))
        assert Path(stored, "config.yaml").read_text() == config(home, server.url).to_yaml()
        assert Path(stored, "figures", "loss.png").stat().st_size > 1000


def test_a_failing_job_is_marked_failed_and_an_interrupted_one_killed(
    home: Path, run_folder: Path
) -> None:
    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    for error, status in ((ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")):
        with (
            pytest.raises(error),
            TrackedRun.start(config(home), run_folder=run_folder) as tracked,
        ):
            raise error
        assert client.get_run(tracked.run_id).info.status == status


def test_an_experiment_deleted_in_mlflow_is_told_with_the_way_out(
    home: Path, run_folder: Path
) -> None:
    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    client.delete_experiment(client.create_experiment("s2ft/acme"))
    tracked = TrackedRun.start(config(home), run_folder=run_folder)
    assert not tracked.finish("FINISHED", timeout_s=1)
    with pytest.raises(JobError, match=r"'s2ft/acme' is deleted in MLflow; restore it"):
        deliver_run(config(home), run_folder)
