"""MLflow, and nothing else of the package knows it: runs, registered adapters, the flavour."""

from s2ft_ray.registry.connection import default_tracking_uri
from s2ft_ray.registry.lineage import Parent, resolve_parent
from s2ft_ray.registry.names import ModelRef, check_alias, check_name, parse_ref
from s2ft_ray.registry.resolution import ResolvedAdapter, resolve_adapter
from s2ft_ray.registry.tracking import TrackedRun, deliver_run
from s2ft_ray.registry.versions import RegisteredVersion, register_adapter

__all__ = [
    "ModelRef",
    "Parent",
    "RegisteredVersion",
    "ResolvedAdapter",
    "TrackedRun",
    "check_alias",
    "check_name",
    "default_tracking_uri",
    "deliver_run",
    "parse_ref",
    "register_adapter",
    "resolve_adapter",
    "resolve_parent",
]
