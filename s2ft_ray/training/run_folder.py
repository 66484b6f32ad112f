"""The run folder: everything that one run leaves on disk, and where.

    <storage>/<tenant>/<name>/<run_id>/
        config.yaml      the resolved configuration
        world.json       what the workers were: count, threads, sharding; a resumed run keeps them
        selection.json   which heads, channels, rows and columns are trained
        data/            the encoded rows, written once by the driver
        parent/          the adapter that the run starts from, where it has a parent
        avoided/         0/ ...: the adapters whose heads and channels it leaves alone
        lineage.json     that parent's name, version and fingerprint, or the names of those avoided
        stop.json        a request to stop at the next step; cleared when the run goes on
        driver.log       what the run's drivers printed, one after the other
        metrics.jsonl    one line for each step and evaluation, written by rank 0
        checkpoints/     step-00000050/ ..., see ``checkpoint``
        profile/         a torch trace of each worker, where tracking.profile asks for it
        adapter/         the trained adapter; whole once its adapter_config.json is there

Invariant: a file here appears by rename, complete or not at all; only ``metrics.jsonl`` and
``driver.log`` grow.
"""

import json
import os
import secrets
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from s2ft_ray.config import RunConfig, load_config, s2ft_home
from s2ft_ray.errors import CheckpointError, ConfigError

STOP = "stop.json"
SELECTION = "selection.json"


@dataclass(frozen=True)
class RunFolder:
    """The layout of one run's folder at `path`."""

    path: Path

    @property
    def run_id(self) -> str:
        return self.path.name

    @property
    def data(self) -> Path:
        return self.path / "data"

    @property
    def parent(self) -> Path:
        return self.path / "parent"

    @property
    def avoided(self) -> Path:
        return self.path / "avoided"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def is_trained(self) -> bool:
        """Whether the adapter is whole: its configuration is the file that appears last."""
        return (self.adapter / "adapter_config.json").is_file()

    @property
    def profile(self) -> Path:
        return self.path / "profile"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "driver.log"

    def check_reachable(self) -> None:
        """Raise ConfigError where this process, maybe on another node, doesn't see the folder."""
        if not (self.path / "config.yaml").is_file():
            raise ConfigError(
                f"checkpoint.storage_path: {self.path} isn't there on node {socket.gethostname()};"
                " name a folder that every node mounts"
            )

    def load_config(self) -> RunConfig:
        """Read the resolved configuration that the run was created with."""
        return load_config(self.path / "config.yaml")

    def request_stop(self, reason: str) -> None:
        """Ask the workers to save a checkpoint after the step they are at, and to leave.

        Starting the workers again clears the request, so ask again while it is to hold.
        """
        self.write_json(STOP, {"reason": reason, "time": time.time()})

    def clear_stop(self) -> None:
        """Take the request back."""
        (self.path / STOP).unlink(missing_ok=True)

    def is_stop_requested(self) -> bool:
        """Return whether a request stands. Cheap: asked at every step."""
        return (self.path / STOP).exists()

    def write_json(self, name: str, document: dict[str, Any]) -> None:
        """Write `name` in one piece: a reader sees the old file or the new one.

        Raises CheckpointError where the storage can't be written.
        """
        partial = self.path / f".{name}.{secrets.token_hex(4)}.partial"  # writers may meet
        try:
            with partial.open("w", encoding="utf-8") as file:
                json.dump(document, file, indent=2)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(self.path / name)
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            raise CheckpointError(
                f"{self.path / name}: {error.strerror or error}; make room there"
            ) from error

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Read `name`, or return None where it was never written."""
        try:
            document: dict[str, Any] = json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return document


def runs_root(config: RunConfig) -> Path:
    """Return the folder that holds the runs: ``checkpoint.storage_path``, absolute."""
    storage = config.checkpoint.storage_path
    return Path(storage).expanduser().absolute() if storage else s2ft_home() / "runs"


def create_run_folder(config: RunConfig, run_id: str | None = None) -> RunFolder:
    """Make a new run's folder and store the resolved configuration in it.

    Raises ConfigError where the storage can't be written.
    """
    root = runs_root(config)
    run_id = run_id or f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
    path = root / config.tenant / config.name / run_id
    try:
        path.mkdir(parents=True)
        (path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"checkpoint.storage_path: {root} can't be written ({error.strerror});"
            " name a folder that every worker can write"
        ) from error
    return RunFolder(path)


def find_run_folder(run: str, root: Path | None = None) -> RunFolder:
    """Find a run by its id or its folder. Raises ConfigError where there is none."""
    given = Path(run).expanduser()
    if (given / "config.yaml").is_file():
        return RunFolder(given.absolute())
    root = root or s2ft_home() / "runs"
    found = sorted(root.glob(f"*/*/{given.name}/config.yaml")) if str(given) == given.name else []
    if len(found) != 1:
        raise ConfigError(
            f"--resume {run}: no run of that id under {root}, and no run folder of that path"
        )
    return RunFolder(found[0].parent)
