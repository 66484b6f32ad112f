"""MLflow, and nothing else of the package knows it: runs, registered adapters, the flavour.

A name is loaded with the module that has it when it is first used: who only looks a version up pays
neither for torch nor for the figures.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from s2ft_ray.registry.aliases import (
        PLACEMENTS,
        REJECTED_TAG,
        AliasedModel,
        list_models,
        note_accepted,
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
    from s2ft_ray.registry.kept import KeptAdapter, forget_kept, list_kept, trim_kept
    from s2ft_ray.registry.lineage import NamedAdapter, Parent, resolve_avoided, resolve_parent
    from s2ft_ray.registry.names import (
        EVERYONE,
        AliasMove,
        ModelRef,
        check_alias,
        check_name,
        parse_ref,
    )
    from s2ft_ray.registry.resolution import (
        LocatedAdapter,
        ResolvedAdapter,
        locate_adapter,
        resolve_adapter,
    )
    from s2ft_ray.registry.tracking import TrackedRun, deliver_run
    from s2ft_ray.registry.versions import RegisteredVersion, register_adapter, register_folder

__all__ = [
    "EVERYONE",
    "PLACEMENTS",
    "REJECTED_TAG",
    "AliasMove",
    "AliasedModel",
    "KeptAdapter",
    "LocatedAdapter",
    "ModelRef",
    "ModuleDelta",
    "NamedAdapter",
    "Parent",
    "RegisteredVersion",
    "ResolvedAdapter",
    "TrackedRun",
    "check_alias",
    "check_name",
    "default_tracking_uri",
    "deliver_run",
    "forget_kept",
    "list_kept",
    "list_models",
    "locate_adapter",
    "log_evaluation",
    "measure_deltas",
    "note_accepted",
    "note_rejected",
    "note_served",
    "parse_ref",
    "place",
    "promote",
    "register_adapter",
    "register_folder",
    "resolve_adapter",
    "resolve_avoided",
    "resolve_parent",
    "rollback",
    "share",
    "trim_kept",
]
_MODULES = {
    "aliases": {
        "PLACEMENTS",
        "REJECTED_TAG",
        "AliasedModel",
        "list_models",
        "note_accepted",
        "note_rejected",
        "note_served",
        "place",
        "promote",
        "rollback",
        "share",
    },
    "connection": {"default_tracking_uri"},
    "deltas": {"ModuleDelta", "measure_deltas"},
    "evaluations": {"log_evaluation"},
    "kept": {"KeptAdapter", "forget_kept", "list_kept", "trim_kept"},
    "lineage": {"NamedAdapter", "Parent", "resolve_avoided", "resolve_parent"},
    "names": {"EVERYONE", "AliasMove", "ModelRef", "check_alias", "check_name", "parse_ref"},
    "resolution": {"LocatedAdapter", "ResolvedAdapter", "locate_adapter", "resolve_adapter"},
    "tracking": {"TrackedRun", "deliver_run"},
    "versions": {"RegisteredVersion", "register_adapter", "register_folder"},
}

if not TYPE_CHECKING:  # a checker would believe every name of it

    def __getattr__(name: str) -> Any:
        for module, names in _MODULES.items():
            if name in names:
                value = getattr(import_module(f"{__name__}.{module}"), name)
                globals()[name] = value
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
