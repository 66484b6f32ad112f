"""Finding a registered adapter: from a reference to a version, its tags and a local folder.

Invariant: an answer is the version that was named or none; nothing falls back to another version.
"""

import errno
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.pyfunc import DATA, FLAVOR_NAME
from yaml import YAMLError

from s2ft_ray.errors import AdapterError, ConfigError
from s2ft_ray.registry.connection import (
    connect,
    default_tracking_uri,
    download,
    is_missing,
    reaching,
)
from s2ft_ray.registry.kept import kept_folder, note_read, trim_kept
from s2ft_ray.registry.names import DEFAULT_ALIAS, ModelRef, parse_ref

_MAX_LISTED = 200
_MAX_SHOWN = 20


@dataclass(frozen=True)
class ResolvedAdapter:
    """A version of a registered adapter, with its files at hand."""

    name: str
    version: int
    alias: str | None
    fingerprint: str
    folder: Path
    tags: dict[str, str]


@dataclass(frozen=True)
class LocatedAdapter:
    """An adapter's folder, and where it was found."""

    folder: Path
    name: str
    """Its registered name, or the folder that was named."""
    version: int | None
    """None for a folder."""

    def __str__(self) -> str:
        return self.name if self.version is None else f"{self.name}:{self.version}"


def locate_adapter(ref: str, tracking_uri: str | None = None) -> LocatedAdapter:
    """Find the adapter that `ref` names: a folder that holds one, else a registered adapter.

    Raises ConfigError for a folder without an adapter, and what `resolve_adapter` raises.
    """
    folder = Path(ref).expanduser()
    if (folder / "adapter_config.json").is_file():
        return LocatedAdapter(folder.absolute(), str(folder.absolute()), None)
    if folder.is_absolute() or folder.is_dir():
        raise ConfigError(
            f"{ref} holds no adapter_config.json; name an adapter's folder or a registered adapter"
            " (<tenant>.<name>, ...@<alias>, ...:<version>)"
        )
    found = resolve_adapter(ref, tracking_uri)
    return LocatedAdapter(found.folder, found.name, found.version)


def resolve_adapter(ref: str, tracking_uri: str | None = None) -> ResolvedAdapter:
    """Find the adapter that `ref` names, and bring its files here.

    `ref` is ``<tenant>.<name>`` (its champion), ``...@<alias>``, ``...:<version>`` or MLflow's
    ``models:/`` form of one. Raises ConfigError for what can't be a name, AdapterError for what
    doesn't exist (naming what does), JobError where MLflow can't be used.
    """
    parsed = parse_ref(ref)
    uri = tracking_uri or default_tracking_uri()
    with reaching(uri, f"{ref}: can't be looked up"):
        client = connect(uri)
        version = find_version(client, parsed)
        fingerprint = version.tags.get("fingerprint")
        if fingerprint is None:
            raise AdapterError(
                f"{parsed.name}:{version.version} has no fingerprint tag: it wasn't registered here"
            )
        folder = adapter_folder(client, version)
    alias = parsed.alias or (None if parsed.version else DEFAULT_ALIAS)
    return ResolvedAdapter(
        name=parsed.name,
        version=int(version.version),
        alias=alias,
        fingerprint=fingerprint,
        folder=folder,
        tags=dict(version.tags),
    )


def adapter_folder(client: MlflowClient, version: ModelVersion) -> Path:
    """Return a local folder with the version's adapter files.

    Files on this machine are read in place; others are fetched once and kept under
    ``$S2FT_HOME/adapters`` by version and fingerprint, which never change.
    """
    uri = client.get_model_version_download_uri(version.name, version.version)
    if uri.startswith(("file:", "/")):
        return _data_folder(download(client, uri))
    fingerprint = version.tags.get("fingerprint", "unknown")
    kept = kept_folder(version.name, version.version, fingerprint)
    note_read(kept)
    if not kept.exists():
        try:
            _fetch(client, uri, kept)
        except (OSError, MlflowException) as error:
            if not _is_disk_full(error):
                raise
            trim_kept(0)  # it holds nothing that can't be fetched again
            _fetch(client, uri, kept)
    return kept


def _fetch(client: MlflowClient, uri: str, kept: Path) -> None:
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
        folder = _data_folder(download(client, uri, scratch))
        try:
            os.rename(folder, kept)
        except OSError:
            if not kept.exists():  # else another process was quicker, with the same files
                raise


def _is_disk_full(error: BaseException | None) -> bool:
    """Tell whether an error, or what it came from, is a full disk or quota."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


def _data_folder(model: Path) -> Path:
    try:
        return model.joinpath(Model.load(str(model)).flavors[FLAVOR_NAME][DATA])
    except (MlflowException, YAMLError, KeyError, TypeError, ValueError) as error:
        raise AdapterError("its MLmodel is missing, or describes no adapter") from error


def find_version(client: MlflowClient, ref: ModelRef) -> ModelVersion:
    """Return the version that `ref` names. Raises AdapterError that says what there is instead."""
    try:
        if ref.version is not None:
            return client.get_model_version(ref.name, str(ref.version))
        return client.get_model_version_by_alias(ref.name, ref.alias or DEFAULT_ALIAS)
    except MlflowException as error:
        model = _registered_model(client, ref.name)
        if model is None:
            raise AdapterError(_unknown_name(client, ref)) from error
        known = model.aliases if ref.version is None else _versions(client, ref.name)
        wanted = ref.version if ref.version is not None else ref.alias or DEFAULT_ALIAS
        if wanted in known:
            raise
        kind = "alias" if ref.version is None else "version"
        raise AdapterError(
            f"{ref}: {ref.name} has no {kind} {wanted}; it has {_listed(known)}"
        ) from error


def find_model(client: MlflowClient, name: str) -> RegisteredModel:
    """Return the registered model. Raises AdapterError that says what there is instead."""
    model = _registered_model(client, name)
    if model is None:
        raise AdapterError(_unknown_name(client, ModelRef(name)))
    return model


def _registered_model(client: MlflowClient, name: str) -> RegisteredModel | None:
    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if is_missing(error):
            return None
        raise


def _versions(client: MlflowClient, name: str) -> list[int]:
    found = client.search_model_versions(f"name = '{name}'", max_results=_MAX_LISTED)
    return sorted(int(version.version) for version in found)


def _unknown_name(client: MlflowClient, ref: ModelRef) -> str:
    tenant = ref.name.partition(".")[0]
    found = client.search_registered_models(f"name LIKE '{tenant}.%'", max_results=_MAX_LISTED)
    known = [model.name for model in found]
    return f"{ref}: no adapter is registered as {ref.name}; of {tenant} there is {_listed(known)}"


def _listed(known: Iterable[object]) -> str:
    items = [str(item) for item in known]
    shown = ", ".join(items[:_MAX_SHOWN]) or "none"
    return shown + (f" and {len(items) - _MAX_SHOWN} more" if len(items) > _MAX_SHOWN else "")
