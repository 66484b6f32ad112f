"""The numbers of the queue that an operator may turn: ``$S2FT_HOME/scheduler.yaml``.

    service: {grace_s: 60, max_waiting: 8}
    policy: {half_life_s: 86400}
    autoscaler: [{name: gpu, max_nodes: 8, resources: {CPU: 8, GPU: 1}, labels: {zone: a}}]

The last are the nodes that Ray's autoscaler may add, by group: jobs may wait for them too. The file
is read when the scheduler starts. Every key has a default, see ``ServiceSettings`` and
``PolicySettings``.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from s2ft_ray.config import s2ft_home
from s2ft_ray.errors import ConfigError
from s2ft_ray.scheduler.views import PolicySettings

FILE = "scheduler.yaml"
_Section = TypeVar("_Section")


@dataclass(frozen=True)
class ServiceSettings:
    """The service's times, in seconds, and counts."""

    grace_s: float = 120.0
    """What a job gets to stop at a step and save, before it is killed."""
    max_waiting: int = 32
    """Drivers that may wait for their turn; an idle one costs 67 MB and more."""
    waits_for_s: float = 15.0
    """A driver that hasn't asked for so long doesn't wait any more."""
    claim_s: float = 10.0
    """What a waiting driver gets to take its admission, before another one is launched."""
    quiet_s: float = 6.0
    """Without a heartbeat for so long a driver is asked for at the launcher."""
    lost_s: float = 30.0
    """A driver that the launcher doesn't know is lost after so long without a heartbeat."""
    hung_s: float = 300.0
    """A driver that lives but is silent for so long is ended."""
    save_s: float = 15.0
    """Progress and usage are written so often."""
    estimate_s: float = 10.0
    """Estimated starts are computed so often."""
    measure_s: float = 60.0
    """Durations are measured anew so often."""


@dataclass(frozen=True)
class NodeGroup:
    """Equal nodes that Ray's autoscaler may add."""

    name: str
    """As the autoscaler calls it."""
    max_nodes: int
    """The most of them that there may be at once."""
    resources: Mapping[str, float] = field(hash=False)
    """Of each."""
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class QueueSettings:
    """All sections."""

    service: ServiceSettings = field(default_factory=ServiceSettings)
    policy: PolicySettings = field(default_factory=PolicySettings)
    autoscaler: tuple[NodeGroup, ...] = ()


def load_settings(path: Path | None = None) -> QueueSettings:
    """Read the settings, None: from the home's file; what isn't there has its default.

    Raises ConfigError for unknown keys and values that are no numbers of at least 0.
    """
    path = path or s2ft_home() / FILE
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (FileNotFoundError, NotADirectoryError):
        return QueueSettings()
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read: {' '.join(str(error).split())}") from error
    faults: list[str] = []
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: holds no sections; write service: {{...}} and policy: {{...}}")
    for name in sorted(document.keys() - {"service", "policy", "autoscaler"}):
        faults.append(f"{path}: {name}: unknown section; known: service, policy, autoscaler")
    service = _read(ServiceSettings, document.get("service") or {}, f"{path}: service", faults)
    policy = _read(PolicySettings, document.get("policy") or {}, f"{path}: policy", faults)
    groups = _read_groups(document.get("autoscaler") or [], f"{path}: autoscaler", faults)
    if faults:
        raise ConfigError(*faults)
    return QueueSettings(service, policy, groups)


def _read_groups(values: Any, where: str, faults: list[str]) -> tuple[NodeGroup, ...]:
    try:
        return TypeAdapter(tuple[NodeGroup, ...]).validate_python(values)
    except ValidationError as error:
        for fault in error.errors():
            key = ".".join(map(str, fault["loc"]))
            faults.append(f"{where}.{key}: {fault['msg']} (got {fault['input']!r})")
        return ()


def _read(kind: type[_Section], values: Any, where: str, faults: list[str]) -> _Section:
    default = kind()
    known = {it.name: getattr(default, it.name) for it in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if not isinstance(values, dict):
        faults.append(f"{where}: holds no settings; write key: number lines")
        return default
    taken: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"known: {', '.join(known)}"
            faults.append(f"{where}.{key}: unknown key; {hint}")
        elif isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            faults.append(f"{where}.{key}: is a number of at least 0 (got {value!r})")
        else:
            taken[key] = type(known[key])(value)
    return kind(**taken)
