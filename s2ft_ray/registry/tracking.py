"""One MLflow run for one job, fed from the run folder.

Rank 0 writes the numbers of each step to ``metrics.jsonl``; the driver's ``TrackedRun`` follows
that file from a thread of its own. So the training never meets MLflow, an MLflow that is down or
slow costs nothing, and memory holds one batch at most.

Invariant: the run folder alone says what MLflow is to hold (see ``journal``); a resumed job goes
on in the same MLflow run, and ``deliver_run`` finishes later what a driver could not.
"""

import json
import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from safetensors import SafetensorError

from s2ft_ray.bases.folders import local_folder
from s2ft_ray.config import RunConfig
from s2ft_ray.data import DataReport
from s2ft_ray.errors import Preempted, S2FTError
from s2ft_ray.method import Adapter, Selection
from s2ft_ray.registry.connection import default_tracking_uri, reaching
from s2ft_ray.registry.courier import Courier
from s2ft_ray.registry.delivery import METRICS, Delivery
from s2ft_ray.registry.deltas import measure_deltas
from s2ft_ray.registry.figures import draw_deltas, draw_loss, draw_selection
from s2ft_ray.registry.journal import Entry, Journal, MetricsFile, Point

log = logging.getLogger(__name__)

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]
JOURNAL = "tracking.json"
SELECTION = "selection.json"  # the workers' note of what they train


class TrackedRun:
    """Records one job in MLflow; nothing here raises or waits for MLflow, except `flush`."""

    def __init__(
        self, config: RunConfig, run_folder: Path, journal: Journal, courier: Courier
    ) -> None:
        self._config = config
        self._folder = run_folder
        self._journal = journal
        self._courier = courier

    @classmethod
    def start(
        cls,
        config: RunConfig,
        *,
        run_folder: Path,
        tags: Mapping[str, str] | None = None,
        interval_s: float = 1.0,
    ) -> Self:
        """Begin to record the run in `run_folder`, or go on where an earlier driver stopped."""
        journal, delivery = _open(config, run_folder)
        if journal.is_new:
            document = run_folder / "config.yaml"
            if not document.exists():
                document.write_text(config.to_yaml(), encoding="utf-8")
            journal.owe(
                Entry("params", _flatten(config.model_dump(mode="json"))),
                _artifact("config.yaml", ""),
            )
        journal.owe(
            Entry("tags", {**run_tags(config), **(tags or {})}),
            Entry("status", {"status": "RUNNING", "time": time.time()}),
        )
        courier = Courier(delivery.deliver, delivery.tracking_uri, interval_s=interval_s)
        courier.start()
        return cls(config, run_folder, journal, courier)

    @property
    def run_id(self) -> str | None:
        """The MLflow run's id; None until MLflow has been reached for the first time."""
        return self._journal.run_id

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Add tags to the run."""
        self._journal.owe(Entry("tags", dict(tags)))

    def record_data(self, report: DataReport) -> None:
        """Record the data files with their digests, and what was counted in the training rows."""
        counted = report.to_dict()
        for key in ("sources", "dropped_rows", "notes"):
            del counted[key]
        contexts = [*["training"] * len(self._config.data.train_files), "evaluation"]
        for index, (source, context) in enumerate(zip(report.sources, contexts, strict=False)):
            profile = {"sha256": source.sha256, "num_rows": source.num_rows}
            payload = {
                "name": Path(source.path).name,
                "digest": source.sha256,
                "source": json.dumps({"uri": source.path}),
                "profile": json.dumps(profile | (counted if index == 0 else {})),
                "context": context,
            }
            self._journal.owe(Entry("dataset", payload))

    def record_adapter(self, adapter: Adapter, parent: Adapter | None = None) -> None:
        """Record what was trained and how far each module moved: metrics, and ``figures/``.

        What can't be measured is logged and left out: the adapter is worth more than its picture.
        """
        self._record_selection()
        figure = self._folder / "figures" / "deltas.png"
        try:
            deltas = measure_deltas(adapter, local_folder(self._config.model, weights=True), parent)
            draw_deltas(deltas, figure, f"{self._config.registered_name}: where the weights moved")
        except (S2FTError, OSError, SafetensorError) as error:
            log.warning("the deltas can't be measured: %s", error)
            return
        values = {key: value for delta in deltas for key, value in delta.values.items()}
        # At the last step and its time: a resumed run that measures again tells the same points.
        last = max(self._points(), key=lambda point: point.step, default=None)
        step, at = (last.step, last.time) if last else (0, time.time())
        self._journal.owe(
            Entry("metrics", {"step": step, "time": at, "values": values}),
            Entry("tags", {"fingerprint": adapter.fingerprint}),
        )
        self.record_file(figure, "figures")

    def _record_selection(self) -> None:
        """Draw which heads and channels the workers have selected, where they have noted it.

        What can't be drawn is logged and left out.
        """
        document, figure = self._folder / SELECTION, self._folder / "figures" / "selection.png"
        if not document.exists():  # an adapter that wasn't trained in this folder
            return
        self.record_file(document)
        try:
            selection = Selection.from_json(json.loads(document.read_text(encoding="utf-8")))
            draw_selection(selection, figure, f"{self._config.registered_name}: what is trained")
        except (OSError, ValueError, KeyError) as error:
            log.warning("the selection can't be drawn: %s", error)
            return
        self.record_file(figure, "figures")

    def record_file(self, path: Path, folder: str = "") -> None:
        """Store a file of the run folder under `folder` among the run's artifacts."""
        self._journal.owe(_artifact(str(path.relative_to(self._folder)), folder))

    def last_values(self, kind: Literal["train", "eval"]) -> dict[str, float]:
        """Return the numbers of the last step or evaluation; none where there was none."""
        points = [point for point in self._points() if point.kind == kind]
        return points[-1].values if points else {}

    def flush(self, timeout_s: float) -> bool:
        """Deliver all that is recorded so far; False where MLflow didn't take it in time."""
        return self._courier.flush(timeout_s)

    def finish(self, status: RunStatus, *, timeout_s: float = 30.0) -> bool:
        """End the run and deliver the rest of it.

        Returns False where MLflow didn't take it within `timeout_s`; the run folder then keeps
        it for `deliver_run`, and the log says so.
        """
        self._record_loss()
        self._journal.owe(Entry("status", {"status": status, "time": time.time()}))
        delivered = self._courier.stop(timeout_s)
        if not delivered:
            log.warning(
                "%s: not all of the run could be delivered to MLflow within %.0f s; nothing is"
                " lost, it stays in the run folder and is delivered when the run is resumed or"
                " registered again",
                self._folder,
                timeout_s,
            )
        return delivered

    def _record_loss(self) -> None:
        points = self._points()
        figure = self._folder / "figures" / "loss.png"
        if not any("loss" in point.values for point in points):
            return
        try:
            draw_loss(points, figure, f"{self._config.registered_name}, run {self._folder.name}")
        except OSError as error:
            log.warning("%s can't be written: %s", figure, error)
            return
        self.record_file(figure, "figures")

    def _points(self) -> list[Point]:
        return MetricsFile(self._folder / METRICS).read({}, limit=sys.maxsize)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.finish("FINISHED")
        else:
            # Short: whoever waits wants to see the error, and the run folder keeps the rest.
            failed = issubclass(kind, Exception) and not issubclass(kind, Preempted)
            self.finish("FAILED" if failed else "KILLED", timeout_s=5.0)


def deliver_run(config: RunConfig, run_folder: Path) -> str:
    """Deliver what `run_folder` still owes MLflow, in the caller's thread; return the run's id.

    Raises JobError where MLflow can't be used.
    """
    _, delivery = _open(config, run_folder)
    with reaching(delivery.tracking_uri, f"{run_folder}: the run's record can't be delivered"):
        return delivery.deliver()


def run_tags(config: RunConfig) -> dict[str, str]:
    """Return the tags that a run has from its beginning."""
    tags = {
        "tenant": config.tenant,
        "model": config.registered_name,
        "base": config.model.name_or_path,
        "selection": config.method.selection,
    }
    return tags if config.registry.parent is None else {**tags, "parent": config.registry.parent}


def _open(config: RunConfig, run_folder: Path) -> tuple[Journal, Delivery]:
    journal = Journal(run_folder / JOURNAL)
    delivery = Delivery(
        run_folder,
        journal,
        tracking_uri=default_tracking_uri(config),
        experiment=config.tracking.experiment or f"s2ft/{config.tenant}",
    )
    return journal, delivery


def _artifact(path: str, folder: str) -> Entry:
    return Entry("artifact", {"path": path, "folder": folder})


def _flatten(document: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in document.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, str) else json.dumps(value)
    return flat
