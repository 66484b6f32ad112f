"""Room in the cluster, and what a run does whose node is to go; no Ray is started."""

from pathlib import Path
from typing import Any

import pytest

from s2ft_ray.config import ParallelConfig
from s2ft_ray.errors import ConfigError, Diverged, Preempted, S2FTError
from s2ft_ray.training import launch
from s2ft_ray.training.run_folder import RunFolder

PAIR = ParallelConfig(num_workers=2, resources_per_worker={"CPU": 2})


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
    elastic = ParallelConfig(num_workers=(1, 4), resources_per_worker={"CPU": 2})
    cluster.update(a=4, drained=8)
    assert launch._num_workers(elastic) == 2


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
