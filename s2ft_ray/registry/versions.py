"""Registered adapters: making a version of one, and finding one by its name.

Registration is a chain of steps of which each can be repeated: logged model, version, check,
alias. Run again after a crash, it finds what is there by run and fingerprint and does the rest.

Invariant: the alias moves last, onto a version whose files have been read back with the right
fingerprint; and a version is given its alias once, so that a repeated registration can't take the
alias back from what was promoted since.
"""

import logging
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version as package_version
from pathlib import Path

import mlflow.pyfunc
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput, Metric
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types.schema import AnyType, ColSpec, DataType, ParamSchema, ParamSpec, Schema

from s2ft_ray.config import RunConfig
from s2ft_ray.errors import AdapterError, JobError
from s2ft_ray.method import Adapter
from s2ft_ray.registry.aliases import move_alias
from s2ft_ray.registry.connection import (
    connect,
    default_tracking_uri,
    ensure_experiment,
    reaching,
)
from s2ft_ray.registry.lineage import LINEAGE_TAGS
from s2ft_ray.registry.names import DEFAULT_ALIAS, check_alias, check_name
from s2ft_ray.registry.resolution import adapter_folder

log = logging.getLogger(__name__)

LOADER_MODULE = "s2ft_ray.registry.pyfunc"
ALIAS_TAG = "s2ft.alias"  # on a version: the alias that its registration has set
_PAUSES_S = (1.0, 4.0, 10.0)
_FILTERS = threading.Lock()  # catch_warnings sets the whole process's filters: one at a time


@dataclass(frozen=True)
class RegisteredVersion:
    """What a registration made."""

    name: str
    version: int
    alias: str
    fingerprint: str


def register_adapter(
    folder: Path,
    config: RunConfig,
    *,
    mlflow_run_id: str,
    tags: Mapping[str, str] | None = None,
    metrics: Mapping[str, float] | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> RegisteredVersion:
    """Register the adapter in `folder` as a version of ``<tenant>.<name>`` and give it its alias.

    The version carries the lineage tags of its MLflow run, and `tags` beside them; `metrics` are
    shown with the model, as ``final/...``. Tried 4 times; run again later, it completes what it
    began.

    Raises AdapterError for a damaged adapter, RegistryUnreachable where MLflow can't be used.
    """
    adapter = Adapter.load(folder)
    uri = default_tracking_uri(config)
    registration = _Registration(
        folder,
        adapter,
        config.registered_name,
        config.registry.alias,
        mlflow_run_id,
        {"base": adapter.base.name or config.model.name_or_path, **(tags or {})},
        metrics or {},
    )
    for pause_s in _PAUSES_S:
        try:
            with reaching(uri, f"{folder}: the adapter is trained but not registered"):
                return registration.complete(connect(uri))
        except JobError as error:
            log.warning("%s; trying again in %.0f s", error, pause_s)
            sleep(pause_s)
    with reaching(uri, f"{folder}: the adapter is trained but not registered"):
        return registration.complete(connect(uri))


def register_folder(
    folder: Path, name: str, alias: str = DEFAULT_ALIAS, tracking_uri: str | None = None
) -> RegisteredVersion:
    """Register an adapter that no run made: a fused one, or one of a training loop of your own.

    The same adapter is one version of `name`, ``<tenant>.<name>``, however often it is registered;
    `alias` points to it then. Raises ConfigError for names that can't be, AdapterError for a
    damaged adapter, RegistryUnreachable where MLflow can't be used.
    """
    check_name(name)
    check_alias(alias)
    adapter = Adapter.load(folder)
    parts = adapter.training.get("fused", ())
    fused = ", ".join(f"{part['weight']:+g} x {part['fingerprint'][:12]}" for part in parts)
    tags = {"base": adapter.base.name or "unknown"} | ({"fused": fused} if fused else {})
    uri = tracking_uri or default_tracking_uri()
    with reaching(uri, f"{folder}: the adapter can't be registered"):
        client = connect(uri)
        known = [
            version
            for version in client.search_model_versions(f"name = '{name}'")
            if version.tags.get("fingerprint") == adapter.fingerprint
        ]
        run_id = known[0].run_id if known else _log_folder(client, name, tags)
        registration = _Registration(folder, adapter, name, alias, run_id, tags, {})
        made = registration.complete(client)
        if client.get_registered_model(name).aliases.get(alias) != str(made.version):
            move_alias(client, name, alias, made.version)
        return replace(made, alias=alias)


def _log_folder(client: MlflowClient, name: str, tags: Mapping[str, str]) -> str:
    """Make the finished run that a version needs; return its id."""
    tenant = name.partition(".")[0]
    experiment = ensure_experiment(client, f"s2ft/{tenant}")
    run = client.create_run(
        experiment, run_name=name, tags={**tags, "tenant": tenant, "kind": "registration"}
    )
    run_id: str = run.info.run_id
    client.set_terminated(run_id)
    return run_id


class _Registration:
    def __init__(
        self,
        folder: Path,
        adapter: Adapter,
        name: str,
        alias: str,
        run_id: str,
        tags: Mapping[str, str],
        metrics: Mapping[str, float],
    ) -> None:
        self.folder = folder
        self.fingerprint = adapter.fingerprint
        self.name = name
        self.alias = alias
        self.run_id = run_id
        self.metrics = metrics
        self.tags = {
            "tenant": name.partition(".")[0],
            "base_fingerprint": adapter.base.fingerprint,
            "fingerprint": self.fingerprint,
            "selection": adapter.config.selection,
            **tags,
        }

    def complete(self, client: MlflowClient) -> RegisteredVersion:
        run_tags = client.get_run(self.run_id).data.tags
        self.tags = {key: run_tags[key] for key in LINEAGE_TAGS if key in run_tags} | self.tags
        version = self._find_version(client) or self._create_version(client)
        number = str(version.version)
        if ALIAS_TAG not in version.tags:
            self._verify(client, version)
            move_alias(client, self.name, self.alias, int(number))
            client.set_model_version_tag(self.name, number, ALIAS_TAG, self.alias)
        alias = version.tags.get(ALIAS_TAG, self.alias)
        return RegisteredVersion(self.name, int(number), alias, self.fingerprint)

    def _find_version(self, client: MlflowClient) -> ModelVersion | None:
        found = client.search_model_versions(f"name = '{self.name}' and run_id = '{self.run_id}'")
        same = [v for v in found if v.tags.get("fingerprint") == self.fingerprint]
        return min(same, key=lambda v: int(v.version)) if same else None

    def _create_version(self, client: MlflowClient) -> ModelVersion:
        model = self._find_logged_model(client) or self._log_model(client)
        try:
            client.create_registered_model(self.name, tags={"tenant": self.tags["tenant"]})
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        # The artifact location and not models:/<id>: MLflow would look the id up in its global
        # tracking URI instead of this client's.
        return client.create_model_version(
            self.name,
            model.artifact_location,
            run_id=self.run_id,
            model_id=model.model_id,
            tags=self.tags,
        )

    def _find_logged_model(self, client: MlflowClient) -> LoggedModel | None:
        experiment_id = client.get_run(self.run_id).info.experiment_id
        found = client.search_logged_models(
            [experiment_id],
            f"source_run_id = '{self.run_id}' AND tags.fingerprint = '{self.fingerprint}'",
        )
        ready = [model for model in found if model.status == "READY"]
        return ready[0] if ready else None

    def _log_model(self, client: MlflowClient) -> LoggedModel:
        experiment_id = client.get_run(self.run_id).info.experiment_id
        model = client.create_logged_model(
            experiment_id,
            name=self.name.replace(".", "-"),
            source_run_id=self.run_id,
            tags=self.tags,
            model_type="s2ft",
        )
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "model"
            _save_model(path, self.folder, self.run_id, model, self.tags)
            client.log_model_artifacts(model.model_id, str(path))
        client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, step=0)])
        now_ms = int(time.time() * 1000)
        metrics = [
            Metric(f"final/{key}", value, now_ms, 0, model_id=model.model_id, run_id=self.run_id)
            for key, value in self.metrics.items()
        ]
        client.log_batch(self.run_id, metrics=metrics)
        return client.finalize_logged_model(model.model_id, "READY")

    def _verify(self, client: MlflowClient, version: ModelVersion) -> None:
        folder = adapter_folder(client, version)
        stored = Adapter.load(folder).fingerprint
        if stored != self.fingerprint:
            raise AdapterError(
                f"{self.name}:{version.version} reads back with fingerprint {stored}, not"
                f" {self.fingerprint}; it gets no alias. Delete the version and register again"
            )


def model_signature() -> ModelSignature:
    """Return what the flavour takes and gives."""
    signature = ModelSignature(
        inputs=Schema(
            [
                ColSpec(DataType.string, "prompt", required=False),
                ColSpec(AnyType(), "messages", required=False),
            ]
        ),
        outputs=Schema([ColSpec(DataType.string)]),
        params=ParamSchema(
            [
                ParamSpec("max_new_tokens", DataType.long, 128),
                ParamSpec("temperature", DataType.double, 0.0),
                ParamSpec("seed", DataType.long, 0),
            ]
        ),
    )
    # The flavour checks its input itself. MLflow would force a plain list of prompts into these
    # columns, find none of that name and drop the prompts.
    signature._is_signature_from_type_hint = True
    return signature


def _save_model(
    path: Path, folder: Path, run_id: str, model: LoggedModel, tags: Mapping[str, str]
) -> None:
    with _FILTERS, warnings.catch_warnings():
        # An example would have MLflow load the base and generate, to check a signature we know.
        warnings.filterwarnings("ignore", message=".*input example was not provided")
        mlflow.pyfunc.save_model(
            path,
            loader_module=LOADER_MODULE,
            data_path=str(folder),
            mlflow_model=Model(
                artifact_path=model.artifact_location,
                model_uuid=model.model_id,
                model_id=model.model_id,
                run_id=run_id,
            ),
            signature=model_signature(),
            pip_requirements=_requirements(),
            metadata=dict(tags),
        )


def _requirements() -> list[str]:
    # Named here, since MLflow else runs the model in a process of its own to find them out.
    packages = ("s2ft-ray", "torch", "transformers", "safetensors", "mlflow")
    return [f"{name}=={package_version(name).partition('+')[0]}" for name in packages]
