"""Room in the cluster, what Ray Train is told, and a run whose node is to go; no Ray is started."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from s2ft_ray.config import ParallelConfig
from s2ft_ray.errors import (
    ConfigError,
    Diverged,
    JobError,
    NodeLost,
    Preempted,
    S2FTError,
    WorkersLost,
)
from s2ft_ray.finetune.attempt import _outcome_of
from s2ft_ray.training import launch
from s2ft_ray.training.run_folder import RunFolder

PAIR = ParallelConfig(num_workers=2, resources_per_worker={"CPU": 2})
ELASTIC = ParallelConfig(num_workers=(1, 4), resources_per_worker={"CPU": 2})


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Nodes by id with their CPUs; those called "drained" are being drained."""
    nodes: dict[str, float] = {}

    def listed() -> list[dict[str, Any]]:
        return [{"NodeID": n, "Alive": True, "Resources": {"CPU": c}} for n, c in nodes.items()]

    monkeypatch.setattr(launch.ray, "nodes", listed)
    draining = {"drained": 0}
    monkeypatch.setattr(launch.ray_state, "get_draining_nodes", lambda: draining)
    return nodes


def test_workers_that_never_fit_are_refused_with_what_there_is(cluster: dict[str, float]) -> None:
    cluster.update(a=3, b=1)  # 4 CPUs, but one worker's two on one node alone
    with pytest.raises(ConfigError, match=r"2 workers of CPU 2 never fit: .* room for 1; lower"):
        launch.check_room(PAIR)
    cluster["b"] = 2
    launch.check_room(PAIR)
    cluster["drained"] = cluster.pop("b")
    with pytest.raises(ConfigError, match="never fit"):
        launch.check_room(PAIR)


def test_labels_bind_workers_to_their_nodes(cluster: dict[str, float]) -> None:
    cluster.update(a=8)
    bound = PAIR.model_copy(update={"labels_per_worker": {"zone": "a"}})
    with pytest.raises(ConfigError, match=r"has 0 node\(s\) carrying zone=a"):
        launch.check_room(bound)


def test_a_range_takes_the_most_that_fit_on_the_nodes_that_stay(cluster: dict[str, float]) -> None:
    cluster.update(a=4, drained=8)
    assert launch._num_workers(ELASTIC) == 2


def told(monkeypatch: pytest.MonkeyPatch, *faults: Exception) -> list[dict[str, Any]]:
    """Let Ray Train end with one fault after the other, then well; return how it was built."""
    trainers: list[dict[str, Any]] = []

    def build(self: object, entry: Any, **options: Any) -> None:
        del self, entry
        trainers.append(options)

    def fit(self: object) -> SimpleNamespace:
        del self
        if len(trainers) <= len(faults):
            raise faults[len(trainers) - 1]
        return SimpleNamespace(return_value=None)

    # on Ray's class, so that no subclass of it starts a Ray
    monkeypatch.setattr(launch.TorchTrainer, "__init__", build)
    monkeypatch.setattr(launch.TorchTrainer, "fit", fit)
    return trainers


def test_ray_train_is_told_one_number_of_workers_and_when_to_give_up(
    cluster: dict[str, float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cluster.update(a=4, b=3)
    trainers = told(monkeypatch)
    assert launch._fit(RunFolder(tmp_path), ELASTIC) is None
    (trainer,) = trainers
    # of a range Ray Train would resize the group by itself
    assert type(trainer["scaling_config"].num_workers) is int
    assert trainer["scaling_config"].num_workers == 3
    assert trainer["scaling_config"].resources_per_worker == {"CPU": 2}
    assert trainer["train_loop_config"] == {"run_folder": str(tmp_path), "num_threads": 2}
    failures = trainer["run_config"].failure_config
    assert failures.max_failures > 0  # by default none, and -1 is for ever
    assert failures.controller_failure_limit > 0


def test_every_start_of_the_workers_has_its_own_folder_in_the_run(
    cluster: dict[str, float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cluster.update(a=4)
    trainers = told(monkeypatch)
    launch._fit(RunFolder(tmp_path), ELASTIC)
    (tmp_path / "ray" / "attempt-1").mkdir(parents=True)  # as Ray Train does
    launch._fit(RunFolder(tmp_path), ELASTIC)
    assert [it["run_config"].name for it in trainers] == ["attempt-1", "attempt-2"]
    for trainer in trainers:
        assert Path(trainer["run_config"].storage_path) == tmp_path / "ray"


def test_a_controller_that_gave_up_is_told_in_one_line(
    cluster: dict[str, float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cluster.update(a=4)
    cause = RuntimeError("Traceback (most recent call last):\n  ...\nno workers after 30 tries\n")
    told(monkeypatch, ControllerError(cause))
    with pytest.raises(JobError, match=r"^Ray Train gave up: no workers after 30 tries; .*$") as it:
        launch._fit(RunFolder(tmp_path), ELASTIC)
    assert len(str(it.value).splitlines()) == 1
    assert isinstance(it.value.__cause__, ControllerError)


LOST = RayActorError(error_msg="its worker process has died")


@pytest.mark.parametrize("error", [ControllerError(LOST), LOST], ids=["told", "the controller"])
def test_a_process_lost_where_ray_train_gives_up_is_told_as_lost(
    error: Exception, cluster: dict[str, float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cluster.update(a=4)
    trainers = told(monkeypatch, error)
    with pytest.raises(WorkersLost, match=r"its worker process has died.*--resume goes on"):
        launch.train_with_ray(RunFolder(tmp_path), ELASTIC)
    assert len(trainers) == 1  # not by this process: see launch._GONE


@pytest.mark.parametrize(
    "error", [WorkerGroupError("lost", {0: LOST}), LOST], ids=["the workers", "the controller"]
)
def test_workers_that_died_with_their_node_are_told_as_that(
    error: Exception, cluster: dict[str, float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cluster.update(a=4, b=4)
    told(monkeypatch, error)
    fit = launch.TorchTrainer.fit

    def lose_a_node(self: Any) -> Any:
        cluster.pop("b", None)
        return fit(self)

    monkeypatch.setattr(launch.TorchTrainer, "fit", lose_a_node)
    with pytest.raises(NodeLost, match=r"lost nodes: b; .*--resume goes on") as raised:
        launch._fit(RunFolder(tmp_path), ELASTIC)
    assert _outcome_of(raised.value)["reason"] == "node_lost"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_for_a_stop_and_the_next_is_as_it_was(
    number: signal.Signals, tmp_path: Path
) -> None:
    run, before = RunFolder(tmp_path), signal.getsignal(number)
    with launch._stopped_by_signals(run):
        assert signal.getsignal(number) != before
        os.kill(os.getpid(), number)
        assert run.is_stop_requested()
        assert signal.getsignal(number) == before


def fits(monkeypatch: pytest.MonkeyPatch, *outcomes: S2FTError | None) -> list[int]:
    """Let each start of the workers end so; return what counts them."""
    started: list[int] = []

    def fit(run: RunFolder, parallel: ParallelConfig) -> S2FTError | None:
        del run, parallel
        started.append(1)
        return outcomes[len(started) - 1]

    monkeypatch.setattr(launch, "_fit", fit)
    return started


def test_a_drained_run_goes_on_where_the_others_have_room(
    cluster: dict[str, float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cluster.update(a=4, drained=4)
    started = fits(monkeypatch, Preempted(3), Preempted(7), None)
    launch.train_with_ray(RunFolder(tmp_path), PAIR)
    assert len(started) == 3


def test_a_drained_run_without_room_ends_as_preempted(
    cluster: dict[str, float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cluster.update(a=2, drained=4)
    started = fits(monkeypatch, Preempted(3), None)
    with pytest.raises(Preempted):
        launch.train_with_ray(RunFolder(tmp_path), PAIR)
    assert len(started) == 1


def test_a_run_that_was_asked_to_stop_or_failed_is_not_started_again(
    cluster: dict[str, float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cluster.update(a=4)
    run = RunFolder(tmp_path)
    started = fits(monkeypatch, Diverged("nan"), Preempted(3))
    with pytest.raises(Diverged):
        launch.train_with_ray(run, PAIR)
    monkeypatch.setattr(RunFolder, "is_stop_requested", lambda _: True)
    with pytest.raises(Preempted):
        launch.train_with_ray(run, PAIR)
    assert len(started) == 2
