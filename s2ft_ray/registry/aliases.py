"""Aliases: which version is live, which was before it, and moving one.

Invariant: an alias moves onto a version that exists, and where it stood is kept with the model, so
that the move can be taken back. What serving found out about a version is noted beside it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from mlflow import MlflowClient

from s2ft_ray.errors import AdapterError, ConfigError
from s2ft_ray.registry.connection import connect, default_tracking_uri, reaching
from s2ft_ray.registry.names import (
    DEFAULT_ALIAS,
    EVERYONE,
    AliasMove,
    ModelRef,
    check_alias,
    check_name,
    check_tenant,
)
from s2ft_ray.registry.resolution import find_model, find_version

_PREVIOUS = "s2ft.previous."  # on a model, by alias: the version that it pointed to before
_SERVED = "s2ft.served."  # on a model, by alias: the last version that serving has accepted
_SHARED = "s2ft.shared_with"  # on a model: tenants that may call it, separated by commas; * all
_PLACED = "s2ft.placed."  # on a model, by alias: how it is kept on the replicas
REJECTED_TAG = "s2ft.rejected"  # on a version: why serving gives it no traffic
PLACEMENTS = ("warm", "pinned", "dedicated")
_PAGE = 1000


@dataclass(frozen=True)
class AliasedModel:
    """A registered model as serving sees it."""

    name: str
    aliases: Mapping[str, int]
    """Version by alias."""
    served: Mapping[str, int]
    """By alias: the last version that serving has accepted."""
    shared_with: frozenset[str]
    """Tenants beside the owner; ``*``: everyone."""
    placements: Mapping[str, str] = field(default_factory=dict)
    """By alias: ``warm``, ``pinned`` or ``dedicated``; those that come and go are not in it."""


def list_models(tracking_uri: str | None = None) -> list[AliasedModel]:
    """Return every registered model. Raises JobError where MLflow can't be used."""
    uri = tracking_uri or default_tracking_uri()
    models: list[AliasedModel] = []
    with reaching(uri, "the models can't be listed"):
        client, token = connect(uri), None
        while True:
            page = client.search_registered_models(max_results=_PAGE, page_token=token)
            models += [
                AliasedModel(
                    name=model.name,
                    aliases={alias: int(version) for alias, version in model.aliases.items()},
                    served=_by_alias(model.tags, _SERVED),
                    shared_with=_tenants(model.tags.get(_SHARED, "")),
                    placements=_placements(model.tags),
                )
                for model in page
            ]
            token = page.token
            if not token:
                return models


def promote(
    name: str, version: int, alias: str = DEFAULT_ALIAS, tracking_uri: str | None = None
) -> AliasMove:
    """Point `alias` of the registered model `name` at `version`.

    Raises ConfigError for names that can't be, AdapterError for a version that doesn't exist,
    JobError where MLflow can't be used.
    """
    check_name(name)
    check_alias(alias)
    uri = tracking_uri or default_tracking_uri()
    with reaching(uri, f"{name}: {alias} can't be moved"):
        client = connect(uri)
        find_version(client, ModelRef(name, version=version))
        before = client.get_registered_model(name).aliases.get(alias)
        return _move(client, name, alias, version, None if before is None else int(before))


def rollback(name: str, alias: str = DEFAULT_ALIAS, tracking_uri: str | None = None) -> AliasMove:
    """Point `alias` at the version where it stood before; rolling back twice goes forth again.

    Raises what `promote` raises, and AdapterError where nothing is known to go back to.
    """
    check_name(name)
    check_alias(alias)
    uri = tracking_uri or default_tracking_uri()
    with reaching(uri, f"{name}: {alias} can't be rolled back"):
        client = connect(uri)
        current = find_version(client, ModelRef(name, alias=alias))
        before = client.get_registered_model(name).tags.get(_PREVIOUS + alias)
        if before is None:
            raise AdapterError(
                f"{name}@{alias} is version {current.version} and was no other before; name one:"
                f" s2ft promote {name} VERSION"
            )
        find_version(client, ModelRef(name, version=int(before)))
        return _move(client, name, alias, int(before), int(current.version))


def move_alias(client: MlflowClient, name: str, alias: str, version: int) -> None:
    """Point `alias` at `version`, and remember where it stood."""
    before = client.get_registered_model(name).aliases.get(alias)
    _move(client, name, alias, version, None if before is None else int(before))


def place(name: str, alias: str, placement: str | None, tracking_uri: str | None = None) -> None:
    """Say how serving keeps what `alias` points to; None: as it comes and goes.

    Raises ConfigError for what is no placement, and what `promote` raises.
    """
    check_name(name)
    check_alias(alias)
    if placement is not None and placement not in PLACEMENTS:
        raise ConfigError(f"{placement!r} is no placement; take one of {', '.join(PLACEMENTS)}")
    uri = tracking_uri or default_tracking_uri()
    with reaching(uri, f"{name}: {alias} can't be placed"):
        client = connect(uri)
        find_version(client, ModelRef(name, alias=alias))
        if placement is not None:
            client.set_registered_model_tag(name, _PLACED + alias, placement)
        elif _PLACED + alias in client.get_registered_model(name).tags:
            client.delete_registered_model_tag(name, _PLACED + alias)


def share(name: str, tenants: Iterable[str], tracking_uri: str | None = None) -> None:
    """Let these tenants call the model, beside its owner, and no others; ``*``: everyone.

    Raises ConfigError for names that can't be, AdapterError for a model that doesn't exist,
    JobError where MLflow can't be used.
    """
    check_name(name)
    chosen = sorted(set(tenants))
    for tenant in chosen:
        if tenant != EVERYONE:
            check_tenant(tenant)
    uri = tracking_uri or default_tracking_uri()
    with reaching(uri, f"{name}: can't be shared"):
        client = connect(uri)
        find_model(client, name)
        client.set_registered_model_tag(name, _SHARED, ",".join(chosen))


def note_served(name: str, alias: str, version: int, tracking_uri: str) -> None:
    """Remember the version that took an alias's traffic: what a restarted service falls back to."""
    with reaching(tracking_uri, f"{name}: can't be marked"):
        client = connect(tracking_uri)
        client.set_registered_model_tag(name, _SERVED + alias, str(version))


def note_rejected(name: str, version: int, reason: str, tracking_uri: str) -> None:
    """Write onto a version why it takes no traffic, for whoever looks at it in MLflow."""
    with reaching(tracking_uri, f"{name}: can't be marked"):
        client = connect(tracking_uri)
        client.set_model_version_tag(name, str(version), REJECTED_TAG, reason[:500])


def note_accepted(name: str, version: int, tracking_uri: str) -> None:
    """Take from a version what `note_rejected` wrote there: it has passed its checks since."""
    with reaching(tracking_uri, f"{name}: can't be marked"):
        client = connect(tracking_uri)
        if REJECTED_TAG in client.get_model_version(name, str(version)).tags:
            client.delete_model_version_tag(name, str(version), REJECTED_TAG)


def _move(
    client: MlflowClient, name: str, alias: str, version: int, before: int | None
) -> AliasMove:
    if before == version:
        return AliasMove(name, alias, version, before)
    if before is not None:
        client.set_registered_model_tag(name, _PREVIOUS + alias, str(before))
    client.set_registered_model_alias(name, alias, str(version))
    return AliasMove(name, alias, version, before)


def _by_alias(tags: Mapping[str, str], prefix: str) -> dict[str, int]:
    return {
        key.removeprefix(prefix): int(value)
        for key, value in tags.items()
        if key.startswith(prefix) and value.isdecimal()
    }


def _placements(tags: Mapping[str, str]) -> dict[str, str]:
    return {
        key.removeprefix(_PLACED): value
        for key, value in tags.items()
        if key.startswith(_PLACED) and value in PLACEMENTS
    }


def _tenants(listed: str) -> frozenset[str]:
    return frozenset(tenant.strip() for tenant in listed.split(",") if tenant.strip())
