"""Reaching MLflow: which tracking URI, a client with short time-outs, the tenant's experiment.

Invariant: nothing here touches MLflow's global state (active run, global tracking URI); every
call goes through a client that was made for one URI.
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from s2ft_ray.config import RunConfig, s2ft_home
from s2ft_ray.errors import JobError, RegistryUnreachable

# MLflow retries a dead server 7 times with doubling pauses, 4 minutes for one call. Retrying is
# the callers' part here, so that each call is over soon and an end can be waited for.
_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0",
    "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    # links among what a command prints for a program
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
_S3_ERRORS = (
    ("boto3.exceptions", "Boto3Error"),
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
)
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


def default_tracking_uri(config: RunConfig | None = None) -> str:
    """Return ``tracking.uri``, else ``$MLFLOW_TRACKING_URI``, else the SQLite file in S2FT_HOME."""
    configured = config.tracking.uri if config is not None else None
    return configured or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{_home_database()}"


def connect(uri: str) -> MlflowClient:
    """Make a client for `uri`, with settings that the user's environment may override."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def reaching(uri: str, purpose: str) -> Iterator[None]:
    """Turn what goes wrong between here and MLflow into RegistryUnreachable: URI and way out."""
    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError, *_s3_errors()) as error:
        raise RegistryUnreachable(
            f"{purpose}: MLflow at {uri} can't be used: {first_line(error)}; start it"
            " (`s2ft up`), or name another in tracking.uri or $MLFLOW_TRACKING_URI"
        ) from error


def _s3_errors() -> tuple[type[Exception], ...]:
    """Return what an artifact store in S3 raises, where MLflow has loaded its client."""
    loaded = ((sys.modules.get(module), name) for module, name in _S3_ERRORS)
    return tuple(getattr(module, name) for module, name in loaded if module is not None)


def is_missing(error: MlflowException) -> bool:
    """Tell whether MLflow answered that the thing asked for does not exist."""
    return bool(error.error_code == "RESOURCE_DOES_NOT_EXIST")


def first_line(error: BaseException) -> str:
    """Return an error's first line: MLflow's messages carry whole tracebacks and SQL."""
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


def ensure_experiment(client: MlflowClient, name: str) -> str:
    """Return the id of experiment `name`, making it where it doesn't exist; safe in a race.

    Raises JobError where the experiment was deleted in MLflow.
    """
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            created: str = client.create_experiment(name, artifact_location(client, name))
            return created
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)
    if experiment.lifecycle_stage != "active":
        raise JobError(
            f"tracking.experiment: {name!r} is deleted in MLflow; restore it (`mlflow experiments"
            f" restore --experiment-id {experiment.experiment_id}`) or name another"
        )
    experiment_id: str = experiment.experiment_id
    return experiment_id


def _home_database() -> str:
    return str(s2ft_home() / "mlflow.db")


def artifact_location(client: MlflowClient, experiment: str) -> str | None:
    """Return where a new experiment's files go; None leaves it to the server.

    A server's default is a mlflow-artifacts: URI, which a reader of its database without the
    server can't open. On one machine a plain folder serves both. For a server elsewhere only its
    own default is right, or the URL in ``$S2FT_ARTIFACT_ROOT`` that both reach.
    """
    folder = re.sub(r"[^A-Za-z0-9_-]+", "-", experiment)
    root = os.environ.get("S2FT_ARTIFACT_ROOT")
    if root:
        return f"{root.rstrip('/')}/{folder}"
    uri = urlsplit(client.tracking_uri)
    if uri.scheme in ("http", "https") and uri.hostname not in _LOOPBACK:
        return None
    return (s2ft_home() / "mlartifacts" / folder).as_uri()


def download(client: MlflowClient, uri: str, target: str | None = None) -> Path:
    """Fetch the artifacts at `uri` into `target`; without one, local files stay in place."""
    return Path(
        mlflow.artifacts.download_artifacts(
            artifact_uri=uri, dst_path=target, tracking_uri=client.tracking_uri
        )
    )
