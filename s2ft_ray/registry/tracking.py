"""One MLflow run for one job, fed from the run folder.

Rank 0 writes the numbers of each step to ``metrics.jsonl``; the driver's ``TrackedRun`` follows
that file from a thread of its own. So the training never meets MLflow, an MLflow that is down or
slow costs nothing, and memory holds one batch at most.

Invariant: the run folder alone says what MLflow is to hold (see ``journal``); a resumed job goes
on in the same MLflow run, and ``deliver_run`` finishes later what a driver could not.
"""

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from s2ft_ray.config import RunConfig
from s2ft_ray.registry.connection import default_tracking_uri, reaching
from s2ft_ray.registry.courier import Courier
from s2ft_ray.registry.delivery import Delivery
from s2ft_ray.registry.journal import Entry, Journal
from s2ft_ray.registry.names import check_alias

log = logging.getLogger(__name__)

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]
JOURNAL = "tracking.json"


class TrackedRun:
    """Records one job in MLflow; nothing here raises or waits for MLflow, except `flush`."""

    def __init__(self, run_folder: Path, journal: Journal, courier: Courier) -> None:
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
        """Begin to record the run in `run_folder`, or go on where an earlier driver stopped.

        Raises ConfigError for an alias that the registry would refuse after the training.
        """
        check_alias(config.registry.alias)
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
        return cls(run_folder, journal, courier)

    @property
    def run_id(self) -> str | None:
        """The MLflow run's id; None until MLflow has been reached for the first time."""
        return self._journal.run_id

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Add tags to the run."""
        self._journal.owe(Entry("tags", dict(tags)))

    def record_dataset(
        self,
        *,
        name: str,
        digest: str,
        source: str,
        context: Literal["training", "evaluation"] = "training",
        profile: Mapping[str, Any] | None = None,
    ) -> None:
        """Record a data file: its digest and source, and what was counted in it."""
        payload = {
            "name": name,
            "digest": digest,
            "source": json.dumps({"uri": source}),
            "profile": json.dumps({**(profile or {}), "sha256": digest}),
            "context": context,
        }
        self._journal.owe(Entry("dataset", payload))

    def record_values(self, values: Mapping[str, float], *, step: int) -> None:
        """Record numbers that belong to the run and not to its steps, the deltas' for example."""
        self._journal.owe(
            Entry("metrics", {"step": step, "time": time.time(), "values": dict(values)})
        )

    def record_file(self, path: Path, folder: str = "") -> None:
        """Store a file of the run folder under `folder` among the run's artifacts."""
        self._journal.owe(_artifact(str(path.relative_to(self._folder)), folder))

    def flush(self, timeout_s: float) -> bool:
        """Deliver all that is recorded so far; False where MLflow didn't take it in time."""
        return self._courier.flush(timeout_s)

    def finish(self, status: RunStatus, *, timeout_s: float = 30.0) -> bool:
        """End the run and deliver the rest of it.

        Returns False where MLflow didn't take it within `timeout_s`; the run folder then keeps
        it for `deliver_run`, and the log says so.
        """
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
            self.finish("FAILED" if issubclass(kind, Exception) else "KILLED")


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
