"""One pass that brings an MLflow run up to what its run folder holds.

Order of a pass: the run itself, the points of ``metrics.jsonl``, the outbox. Every step of it can
be repeated: a run is found again by its tag, and MLflow keeps an identical point, parameter, tag,
dataset or file once.
"""

import logging
import re
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from s2ft_ray.registry.connection import connect, ensure_experiment, is_missing
from s2ft_ray.registry.journal import Entry, Journal, MetricsFile, Point

log = logging.getLogger(__name__)

RUN_TAG = "s2ft.run"
METRICS = "metrics.jsonl"
# MLflow's own limits are 1000 metrics and 100 params or tags in a batch, and 36 characters for a
# digest (a whole sha256 has 64: it goes into the profile).
_METRICS_PER_BATCH = 1000
_POINTS_PER_READ = 200
_PARAMS_PER_BATCH = 100
_DIGEST_CHARS = 36


class Delivery:
    """Delivers one run folder to the MLflow at `tracking_uri`."""

    def __init__(
        self, run_folder: Path, journal: Journal, *, tracking_uri: str, experiment: str
    ) -> None:
        self.tracking_uri = tracking_uri
        self._folder = run_folder
        self._journal = journal
        self._experiment = experiment
        self._metrics = MetricsFile(run_folder / METRICS)
        self._client: MlflowClient | None = None

    def deliver(self) -> str:
        """Deliver all that is owed now, and return the run's id.

        Raises what MLflow raises; what wasn't taken is tried again by the next call.
        """
        try:
            client = self._client or connect(self.tracking_uri)
            if self._client is None:
                self._journal.begin(self._open_run(client))
                self._client = client
            return self._deliver_all(client)
        except BaseException:
            self._client = None  # the MLflow that comes back may not know the run any more
            self._metrics.rewind()
            raise

    def _deliver_all(self, client: MlflowClient) -> str:
        run_id = self._journal.run_id
        assert run_id is not None
        self._deliver_points(client, run_id)
        while (entry := self._journal.next_entry()) is not None:
            self._deliver_entry(client, run_id, entry)
            self._journal.settle_entry()
        return run_id

    def _open_run(self, client: MlflowClient) -> str:
        if self._journal.run_id is not None:
            try:
                run = client.get_run(self._journal.run_id)
                if run.info.lifecycle_stage == "active":
                    return str(run.info.run_id)
            except MlflowException as error:
                if not is_missing(error):
                    raise
        experiment_id = ensure_experiment(client, self._experiment)
        # A driver that was killed between making the run and noting its id left it with this tag.
        identity = "/".join(self._folder.absolute().parts[-3:])
        found = client.search_runs([experiment_id], f"tags.`{RUN_TAG}` = '{identity}'")
        if found:
            return str(found[0].info.run_id)
        run = client.create_run(
            experiment_id,
            start_time=int(self._journal.started_at * 1000),
            run_name="/".join(identity.split("/")[-2:]),
            tags={RUN_TAG: identity},
        )
        return str(run.info.run_id)

    def _deliver_points(self, client: MlflowClient, run_id: str) -> None:
        while points := self._metrics.read(self._journal.last_steps, _POINTS_PER_READ):
            metrics = [metric for point in points for metric in _point_metrics(point)]
            for batch in _batches(metrics, _METRICS_PER_BATCH):
                client.log_batch(run_id, metrics=batch)
            self._journal.settle_points(points)

    def _deliver_entry(self, client: MlflowClient, run_id: str, entry: Entry) -> None:
        payload = entry.payload
        if entry.kind == "params":
            params = [Param(metric_key(key), value) for key, value in payload.items()]
            for batch in _batches(params, _PARAMS_PER_BATCH):
                client.log_batch(run_id, params=batch)
        elif entry.kind == "tags":
            tags = [RunTag(key, value) for key, value in payload.items()]
            for batch in _batches(tags, _PARAMS_PER_BATCH):
                client.log_batch(run_id, tags=batch)
        elif entry.kind == "metrics":
            point = Point("", payload["step"], payload["time"], payload["values"])
            for batch in _batches(_point_metrics(point), _METRICS_PER_BATCH):
                client.log_batch(run_id, metrics=batch)
        elif entry.kind == "dataset":
            client.log_inputs(run_id, datasets=[_dataset_input(payload)])
        elif entry.kind == "artifact":
            path = self._folder / payload["path"]
            if path.exists():
                client.log_artifact(run_id, str(path), payload["folder"] or None)
            else:
                log.warning("MLflow: %s is gone and can't be stored in run %s", path, run_id)
        elif payload["status"] == "RUNNING":
            client.update_run(run_id, status="RUNNING")
        else:
            client.set_terminated(run_id, payload["status"], int(payload["time"] * 1000))


def metric_key(name: str) -> str:
    """Return `name` with the characters that MLflow refuses in a key replaced by '_'."""
    return re.sub(r"[^\w./ :-]", "_", name)[:250]


def _point_metrics(point: Point) -> list[Metric]:
    prefix = f"{point.kind}/" if point.kind else ""
    return [
        Metric(metric_key(prefix + key), value, int(point.time * 1000), point.step)
        for key, value in point.values.items()
    ]


def _dataset_input(payload: dict[str, str]) -> DatasetInput:
    dataset = Dataset(
        name=payload["name"][:500],
        digest=payload["digest"][:_DIGEST_CHARS],
        source_type="local",
        source=payload["source"],
        profile=payload["profile"],
    )
    return DatasetInput(dataset, tags=[InputTag("mlflow.data.context", payload["context"])])


def _batches(items: list[Any], size: int) -> list[list[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
