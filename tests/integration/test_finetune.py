"""The main job on a real Ray and a real MLflow: `ray job submit`, faults, and what is left."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from mlflow import MlflowClient
from nodes import Node

from s2ft_ray.finetune.main import main
from s2ft_ray.method import Adapter
from s2ft_ray.training.run_folder import RunFolder, find_run_folder

REPO = Path(__file__).parents[2]
SHARED = REPO.parent / "shared"
STEPS = 120


def write_config(folder: Path, **sections: Any) -> Path:
    """Write a small run of the embedded base, with `sections` over it."""
    rows = folder / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"prompt": f"Number {i} is", "completion": " odd" if i % 2 else " even"})
            + "\n"
            for i in range(80)
        )
    )
    document: dict[str, Any] = {
        "tenant": "acme",
        "name": "parity",
        "data": {"train": str(rows)},
        "method": {"budgets": {"o": 0.25, "down": 0.1}},
        "optim": {"lr": 5e-3, "max_steps": 12, "global_batch_size": 8, "micro_batch_size": 2},
        "parallel": {"num_workers": 2, "sharding": "replicate"},
        "evaluation": {"every_steps": 40, "num_samples": 1, "max_new_tokens": 4},
        "checkpoint": {"every_steps": 4, "storage_path": str(folder / "runs")},
    }
    for name, values in sections.items():
        inside = document.get(name)
        document[name] = {**inside, **values} if isinstance(inside, dict) else values
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def finetune(env: dict[str, str], *args: str, timeout: int = 500) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "jobs/finetune.py", *args],
        cwd=REPO,
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def only_run(folder: Path) -> RunFolder:
    (config,) = (folder / "runs").glob("*/*/*/config.yaml")
    return find_run_folder(str(config.parent))


@contextmanager
def started(node: Node, config: Path) -> Iterator[subprocess.Popen]:
    """A driver as it runs; what fails before its end ends it."""
    command = [sys.executable, "jobs/finetune.py", "--config", str(config)]
    job = subprocess.Popen(command, cwd=REPO, env=node.env, stderr=subprocess.PIPE, text=True)
    try:
        yield job
    finally:
        job.kill()
        job.communicate()


def wait_for_step(folder: Path, process: subprocess.Popen, step: int) -> RunFolder:
    """Wait until the run's metrics tell of `step`."""
    deadline = time.monotonic() + 500
    while time.monotonic() < deadline and process.poll() is None:
        for metrics in (folder / "runs").glob("*/*/*/metrics.jsonl"):
            if f'"kind": "train", "step": {step},' in metrics.read_text():
                return RunFolder(metrics.parent)
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached")


def metrics_of(run: RunFolder, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def wait_for_start(run: RunFolder, number: int) -> None:
    """Wait until the workers have been started `number` times."""
    deadline = time.monotonic() + 500
    while run.metrics.read_text().count('"kind": "start"') < number:
        assert time.monotonic() < deadline, f"{run.path} was not started {number} times"
        time.sleep(0.05)


def processes_of(node: Node) -> list[tuple[psutil.Process, str]]:
    """Return what runs below the node's services, with its command line."""
    pids = [service["pid"] for service in node.status()["services"] if service["pid"]]
    found = []
    for process in (it for pid in pids for it in psutil.Process(pid).children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            found.append((process, " ".join(process.cmdline())))
    return found


def train_workers(node: Node) -> list[psutil.Process]:
    return [process for process, line in processes_of(node) if "RayTrainWorker" in line]


def driver_of(node: Node, job_id: str) -> psutil.Process:
    """Return the driver that the scheduler has launched for a job."""
    (driver,) = (
        process
        for process, line in processes_of(node)
        if "-m s2ft_ray.finetune" in line
        and job_id in line
        and not line.startswith(("/bin/", "sh "))
    )
    return driver


def wait_for_end(node: Node, job_id: str) -> dict[str, Any]:
    """Wait until a job of the queue has ended; return its story."""
    deadline = time.monotonic() + 500
    while time.monotonic() < deadline:
        story = json.loads(node.s2ft("job", job_id, "--json").stdout)
        if story["finished_at"]:
            return story
        time.sleep(3)  # asking costs a second of a core
    raise AssertionError(f"{job_id} has not ended: {story}")


@pytest.fixture(scope="module")
def undisturbed(node: Node, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The small run when nothing happens to it, by `ray job submit`."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = write_config(folder, optim={"max_steps": STEPS})
    command = ["ray", "job", "submit", "--working-dir", str(REPO), "--"]
    done = subprocess.run(
        [*command, "python", "jobs/finetune.py", "--config", str(config)],
        env=node.env,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"step {STEPS}/{STEPS}  loss" in done.stdout
    assert "tokens/s" in done.stdout
    assert "registered acme.parity version" in done.stdout
    return only_run(folder)


def fingerprint(run: RunFolder) -> str:
    return Adapter.load(run.adapter).fingerprint


def test_a_run_that_is_stopped_and_loses_a_worker_and_its_driver_ends_with_the_same_adapter(
    node: Node, undisturbed: RunFolder, tmp_path: Path
) -> None:
    config = write_config(
        tmp_path,
        optim={"max_steps": STEPS},
        parallel={"sharding": "full"},
        checkpoint={"every_steps": 50},
    )
    with started(node, config) as first:
        run = wait_for_step(tmp_path, first, 5)
        first.send_signal(signal.SIGINT)
        _, stderr = first.communicate(timeout=60)
    assert first.returncode == 3, stderr
    (stop,) = metrics_of(run, "stop")
    assert f"stopped at step {stop['step']}, checkpoint saved" in stderr
    assert f"job {run.run_id} goes on by itself" in stderr

    wait_for_start(run, 2)
    workers = train_workers(node)
    assert len(workers) == 2
    workers[0].kill()
    wait_for_start(run, 3)
    driver_of(node, run.run_id).kill()
    assert not run.adapter.exists()
    story = wait_for_end(node, run.run_id)
    assert story["state"] == "succeeded", story
    assert story["attempt"] == 3
    assert "driver_lost" in " ".join(event["cause"] for event in story["events"])
    begin, *again = [line["step"] for line in metrics_of(run, "start")]
    assert begin == 0
    assert len(again) == 3
    assert set(again) <= {stop["step"], 50, 100}
    assert fingerprint(run) == fingerprint(undisturbed)
    resumed = finetune(node.env, "--resume", str(run.path))
    assert resumed.returncode == 0, resumed.stderr
    same = f"registered acme.parity version {story['model']['version']} as @champion"
    assert resumed.stdout.strip().splitlines()[-1] == same  # the same version, not a second one


def test_where_a_steps_time_went_is_in_mlflow(node: Node, undisturbed: RunFolder) -> None:
    uri = node.env["MLFLOW_TRACKING_URI"]
    client = MlflowClient(uri, uri)
    (run,) = (
        run
        for experiment in client.search_experiments()
        for run in client.search_runs([experiment.experiment_id])
        if run.data.tags.get("job") == undisturbed.run_id
    )
    last = metrics_of(undisturbed, "train")[-1]
    for phase in ("data", "forward", "backward", "optimizer", "write_back", "communication"):
        assert run.data.metrics[f"train/{phase}_seconds"] == last[f"{phase}_seconds"]
        history = client.get_metric_history(run.info.run_id, f"train/{phase}_seconds")
        assert [point.step for point in history] == list(range(1, STEPS + 1))
    for name in ("tokens_per_s", "model_flop_utilisation"):
        assert run.data.metrics[f"train/{name}"] > 0


def test_a_parent_is_continued_without_mlflow_and_registered_later(
    node: Node, undisturbed: RunFolder, tmp_path: Path
) -> None:
    config = write_config(
        tmp_path,
        name="child",
        registry={"parent": str(undisturbed.adapter)},
        optim={"max_steps": 2},
        parallel={"num_workers": 1},
    )
    document = yaml.safe_load(config.read_text())
    del document["method"]
    config.write_text(yaml.safe_dump(document))
    alone = {key: value for key, value in node.env.items() if key != "RAY_ADDRESS"}
    done = finetune({**alone, "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}, "--config", str(config))
    assert done.returncode == 1
    assert "trained but not registered" in done.stderr
    run = only_run(tmp_path)
    child, parent = Adapter.load(run.adapter), Adapter.load(undisturbed.adapter)
    assert child.config == parent.config
    assert child.slices.keys() == parent.slices.keys()
    first, last = metrics_of(run, "eval")[0], metrics_of(undisturbed, "eval")[-1]
    assert first["loss"] == pytest.approx(last["loss"], rel=1e-5)  # it begins where that ended

    resumed = finetune(node.env, "--resume", str(run.path))
    assert resumed.returncode == 0, resumed.stderr
    assert "registered acme.child version" in resumed.stdout
    assert child.fingerprint in resumed.stdout  # what was trained, and no other
    assert len(metrics_of(run, "start")) == 1


def test_preferences_are_trained_and_registered_as_a_job(node: Node, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    rows = (
        {"prompt": f"Number {n} is", "chosen": f" {n}, surely", "rejected": f" {n}, perhaps"}
        for n in range(40)
    )
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = write_config(
        tmp_path,
        name="styled",
        data={"train": str(pairs)},
        objective={"loss": "dpo"},
        optim={"max_steps": 6},
        parallel={"sharding": "full"},
    )
    done = finetune(node.env, "--config", str(config))
    assert done.returncode == 0, done.stderr
    assert "registered acme.styled version 1 as @champion" in done.stdout
    run = only_run(tmp_path)
    assert Adapter.load(run.adapter).training["data"]["format"] == "preference"
    first, last = (metrics_of(run, "eval")[index] for index in (0, -1))
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)  # it is its own reference
    assert last["loss"] < first["loss"] - 0.01
    assert last["token_accuracy"] > first["token_accuracy"] == 0.0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model": {"name_or_path": "./modles/x"}}, "modles/x"),
        ({"data": {"train": "missing.jsonl"}}, "missing.jsonl"),
        ({"optim": {"warmup_step": 1}}, "did you mean warmup_steps?"),
        ({"method": {"budgets": {"o": 1.5}}}, "less than or equal to 1"),
        ({"parallel": {"sharding": "hybride"}}, "parallel.sharding: input should be 'auto'"),
        ({"registry": {"parent": "acme.nobody"}}, "acme.nobody"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(
    tmp_path: Path,
    changes: dict[str, Any],
    expected: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("S2FT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    sections = {**changes, "optim": {"max_steps": 2, **changes.get("optim", {})}}
    code = main(["--config", str(write_config(tmp_path, **sections)), "--dry-run"])
    assert_one_fault(code, capfd.readouterr().err, expected)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"parallel": {"num_workers": 8}}, "8 x (1 CPU) don't fit: all nodes together have 4 CPU"),
        ({"checkpoint": {"storage_path": "/dev/null/runs"}}, "/dev/null/runs can't be written"),
    ],
)
def test_what_the_cluster_can_not_do_is_told_before_a_worker_starts(
    node: Node, tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    config = write_config(
        tmp_path, optim={"global_batch_size": 16, "micro_batch_size": 2}, **changes
    )
    done = finetune(node.env, "--config", str(config))
    assert_one_fault(done.returncode, done.stderr, expected)
    assert not list(tmp_path.glob("runs/*/*/*/adapter"))


def assert_one_fault(code: int, stderr: str, expected: str) -> None:
    assert code == 2, stderr
    faults = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(faults) == 1, stderr
    assert expected in faults[0]
    assert "Traceback" not in stderr


def test_an_unsupported_architecture_says_what_is_supported(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    from s2ft_ray.bases import load_tokenizer
    from s2ft_ray.config import ModelConfig

    base = tmp_path / "bloom"
    tokenizer = load_tokenizer(ModelConfig())
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 8, "n_layer": 1, "n_head": 2}
    BloomForCausalLM(BloomConfig(**sizes)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    config = write_config(tmp_path, model={"name_or_path": str(base)})
    code = main(["--config", str(config), "--dry-run"])
    known = "'bloom' is not supported; supported are gemma, gemma2,"
    assert_one_fault(code, capfd.readouterr().err, known)


@pytest.mark.skipif(not SHARED.exists(), reason="../shared (a real model and data) is absent")
@pytest.mark.timeout(900)
def test_a_real_model_learns_word_problems_and_both_modes_agree(node: Node, tmp_path: Path) -> None:
    import mlflow

    held_out = tmp_path / "held_out.jsonl"
    rows = (SHARED / "data/math/test_svamp.jsonl").read_text().splitlines()
    held_out.write_text("\n".join(rows[:40]))
    made = {}
    for mode in ("replicate", "full"):
        folder = tmp_path / mode
        folder.mkdir()
        config = write_config(
            folder,
            name="math",
            model={"name_or_path": str(SHARED / "models/stories260k")},
            data={
                "train": str(SHARED / "data/math/train.jsonl"),
                "eval": str(held_out),
                "max_seq_len": 320,
                "invalid_rows": "drop",
            },
            method={"budgets": {"o": 0.25, "down": 0.25}},
            optim={"lr": 1e-2, "max_steps": 24, "global_batch_size": 8, "micro_batch_size": 4},
            parallel={"sharding": mode},
            evaluation={"every_steps": 24, "num_samples": 0},
            checkpoint={"every_steps": 12},
        )
        command = ["ray", "job", "submit", "--working-dir", str(REPO), "--"]
        done = subprocess.run(
            [*command, "python", "jobs/finetune.py", "--config", str(config)],
            env=node.env,
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        made[mode] = only_run(folder)
    adapters = {mode: Adapter.load(run.adapter) for mode, run in made.items()}
    assert adapters["replicate"].fingerprint == adapters["full"].fingerprint
    evals = metrics_of(made["full"], "eval")
    assert evals[0]["loss"] == pytest.approx(4.1, abs=0.4)
    assert evals[-1]["loss"] < 0.7 * evals[0]["loss"]
    os.environ["MLFLOW_TRACKING_URI"] = node.env["MLFLOW_TRACKING_URI"]
    try:
        model = mlflow.pyfunc.load_model("models:/acme.math@champion")
        (answer,) = model.predict(["Tom had 3 pens. He got 4 more. How many pens has he?"])
    finally:
        del os.environ["MLFLOW_TRACKING_URI"]
    assert answer.startswith("A: ")  # as the worked answers begin; the base tells a story
