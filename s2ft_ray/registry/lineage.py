"""The adapter that a run continues (``registry.parent``), and the tags that tell of it."""

from dataclasses import dataclass

from s2ft_ray.config import RunConfig
from s2ft_ray.errors import ConfigError
from s2ft_ray.method import Adapter
from s2ft_ray.registry.connection import default_tracking_uri
from s2ft_ray.registry.resolution import locate_adapter

LINEAGE_TAGS = ("parent", "parent_version", "parent_fingerprint", "avoids", "job")


@dataclass(frozen=True)
class NamedAdapter:
    """An adapter, and where it came from."""

    adapter: Adapter
    name: str
    """Its registered name, or the folder that it was read from."""
    version: int | None
    """None for a folder."""

    def __str__(self) -> str:
        return self.name if self.version is None else f"{self.name}:{self.version}"


@dataclass(frozen=True)
class Parent(NamedAdapter):
    """An adapter to start from."""

    @property
    def tags(self) -> dict[str, str]:
        """The lineage that the run and its version carry."""
        tags = {"parent": self.name, "parent_fingerprint": self.adapter.fingerprint}
        return tags if self.version is None else {**tags, "parent_version": str(self.version)}


def resolve_parent(config: RunConfig) -> Parent | None:
    """Find and load ``registry.parent``; None where the run has none.

    Raises ConfigError where the run asks for a selection that isn't the parent's, AdapterError
    for a parent that doesn't exist or is damaged, JobError where MLflow can't be used.
    """
    ref = config.registry.parent
    if ref is None:
        return None
    found = locate_adapter(ref, default_tracking_uri(config))
    parent = Parent(Adapter.load(found.folder), found.name, found.version)
    _check_selection(config, parent)
    return parent


def resolve_avoided(config: RunConfig) -> list[NamedAdapter]:
    """Find and load the adapters of ``registry.avoid``. Raises what `resolve_parent` raises."""
    uri = default_tracking_uri(config)
    located = [locate_adapter(ref, uri) for ref in config.registry.avoid]
    return [NamedAdapter(Adapter.load(it.folder), it.name, it.version) for it in located]


def _check_selection(config: RunConfig, parent: Parent) -> None:
    wanted = config.method
    has = parent.adapter.config
    faults = [
        f"method.{key}: {getattr(wanted, key)!r} is not what the parent {parent.name} was trained"
        f" with ({getattr(has, key)!r}); a run goes on with its parent's selection: leave it out"
        for key in sorted(wanted.model_fields_set)
        if getattr(wanted, key) != getattr(has, key)
    ]
    if faults:
        raise ConfigError(*faults)
