"""MLflow, and nothing else of the package knows it: runs, registered adapters, the flavour."""

from s2ft_ray.registry.aliases import (
    EVERYONE,
    PLACEMENTS,
    AliasedModel,
    AliasMove,
    list_models,
    note_rejected,
    note_served,
    place,
    promote,
    rollback,
    share,
)
from s2ft_ray.registry.connection import default_tracking_uri
from s2ft_ray.registry.deltas import ModuleDelta, measure_deltas
from s2ft_ray.registry.evaluations import log_evaluation
from s2ft_ray.registry.kept import forget_kept, trim_kept
from s2ft_ray.registry.lineage import Parent, resolve_parent
from s2ft_ray.registry.names import ModelRef, check_alias, check_name, parse_ref
from s2ft_ray.registry.resolution import (
    LocatedAdapter,
    ResolvedAdapter,
    locate_adapter,
    resolve_adapter,
)
from s2ft_ray.registry.tracking import TrackedRun, deliver_run
from s2ft_ray.registry.versions import RegisteredVersion, register_adapter

__all__ = [
    "EVERYONE",
    "PLACEMENTS",
    "AliasMove",
    "AliasedModel",
    "LocatedAdapter",
    "ModelRef",
    "ModuleDelta",
    "Parent",
    "RegisteredVersion",
    "ResolvedAdapter",
    "TrackedRun",
    "check_alias",
    "check_name",
    "default_tracking_uri",
    "deliver_run",
    "forget_kept",
    "list_models",
    "locate_adapter",
    "log_evaluation",
    "measure_deltas",
    "note_rejected",
    "note_served",
    "parse_ref",
    "place",
    "promote",
    "register_adapter",
    "resolve_adapter",
    "resolve_parent",
    "rollback",
    "share",
    "trim_kept",
]
