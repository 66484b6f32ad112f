"""What was started: node.json in the home, and the lock that serialises `up` and `down`.

Invariant: a process is recorded before anyone waits for it, so an `up` that is killed halfway
leaves nothing that the next `up` or `down` can't find.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from s2ft_ray.errors import ConfigError, NodeError


class ProcessRecord(BaseModel):
    """A process by pid and start time: a recycled pid is another process."""

    model_config = ConfigDict(frozen=True)

    pid: int
    started: float
    """Seconds since the epoch, as psutil's create_time gives it."""


class NodeRecord(BaseModel):
    """The document in node.json."""

    port_base: int | None = None
    """Stays after `down`, so that a home keeps its addresses."""
    num_cpus: int | None = None
    """What Ray was told; None: the machine's cores."""
    temp_dir: str | None = None
    """Ray's session folder, outside the home: socket paths end at 107 bytes."""
    ports: dict[str, int] = {}
    versions: dict[str, str] = {}
    processes: dict[str, ProcessRecord] = {}


def load_record(home: Path) -> NodeRecord:
    """Read the home's record; an empty one where none is.

    Raises NodeError if the file is damaged.
    """
    path = home / "node.json"
    try:
        return NodeRecord.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return NodeRecord()
    except OSError as error:
        raise _unusable(home, error) from error
    except ValidationError as error:
        raise NodeError(
            f"{path}: is damaged; remove it, then `s2ft down` ends what runs of the node"
        ) from error


def save_record(home: Path, record: NodeRecord) -> None:
    """Write the record whole: a reader sees the old or the new one."""
    path = home / "node.json"
    partial = path.with_suffix(".partial")
    partial.write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


@contextmanager
def locked(home: Path) -> Iterator[None]:
    """Make the home if need be, and keep every other `up` and `down` of it waiting."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        file = open(home / "node.lock", "w")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise _unusable(home, error) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _unusable(home: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"S2FT_HOME {home}: can't be used: {error.strerror}; set it to a folder that you can write"
    )
