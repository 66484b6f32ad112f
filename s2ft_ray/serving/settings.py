"""What a deployment of the service is: the bases, where registry and accounts are, the limits.

Invariant: `s2ft serve` and deploy/serve.yaml fill in the same document.
"""

import os
from typing import Self

from pydantic import Field, model_validator

from s2ft_ray.config import ModelConfig, Section

SERVE_ENV = {
    # A proxy that died is replaced once it has failed three checks: after half a minute by default.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    # A streamed token goes from ingress to proxy, by Ray's objects at twice the cost.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    # A handle's calls are made in the loop that asks for them: in a loop of Serve's, each message
    # goes to another thread and back.
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    # The longest prompts and scored answers are above gRPC's 4 MiB; the ingress has its own limits.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**30),
}
"""What Ray's own processes need in their environment; the image sets the same."""


class BaseSettings(Section):
    """One base model and its replicas."""

    model: ModelConfig = ModelConfig()
    id: str | None = Field(default=None, min_length=1, max_length=512)
    """The name under which it is called; None: the model's name, or its folder's."""
    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=1, ge=1)
    target_requests: int = Field(default=16, ge=1)
    """Requests at once in one replica, above which another replica is started."""
    max_requests: int = Field(default=256, ge=1)
    """Requests at once in one replica; more wait."""
    max_queued: int = Field(default=512, ge=1)
    """Requests that wait for a replica; more are refused with 429."""
    num_cpus: float = Field(default=1.0, ge=0)
    num_gpus: float = Field(default=0.0, ge=0)
    cache_tokens: int = Field(default=16_384, ge=64)
    """Tokens of one replica's KV cache, which all of its requests share; a request's prompt and
    answer must fit it."""
    max_batch_tokens: int = Field(default=512, ge=1)
    """Of one step: what prompts and answers go through the model together."""
    max_batch_requests: int = Field(default=64, ge=1)
    """Requests of one step; more wait for a place."""
    share_prefixes: bool = True
    """Prompts that begin alike, of one tenant and adapter, share what was computed for them."""
    adapter_slot_bytes: int = Field(default=256 * 2**20, ge=2**20)
    """Device memory of one replica for adapters."""
    adapter_host_bytes: int = Field(default=2**30, ge=2**20)
    """Host memory of one replica for adapters that have no slot."""

    @model_validator(mode="after")
    def _check_replicas(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}"
            )
        return self

    @property
    def model_id(self) -> str:
        """The name under which it is called."""
        name = self.model.name_or_path
        if self.id is not None:
            return self.id
        return os.path.basename(os.path.abspath(name)) if os.path.isdir(name) else name


class ServingSettings(Section):
    """The service."""

    bases: list[BaseSettings] = Field(default=[BaseSettings()], min_length=1)
    tracking_uri: str | None = None
    """The MLflow registry; None: ``$MLFLOW_TRACKING_URI``, else the SQLite file in S2FT_HOME."""
    database_url: str | None = None
    """Tenants and keys; None: ``$S2FT_DATABASE_URL``, else ``$S2FT_HOME/scheduler.db``."""
    no_auth: bool = False
    """Answer without a key, as to an operator. `s2ft serve` allows it on loopback alone."""
    poll_s: float = Field(default=2.0, gt=0)
    """Between two looks at the registry."""
    webhook_secret_file: str | None = None
    """The secret of MLflow's webhooks; None: none are taken, and the poll finds every change."""
    request_timeout_s: float = Field(default=600.0, gt=0)
    max_output_tokens: int = Field(default=4096, ge=1)
    """Of one answer, whatever the request asks."""
    adapter_disk_bytes: int = Field(default=16 * 2**30, ge=0)
    """Disk of a node for adapters that were fetched from the registry; those on a folder that the
    node mounts are read in place."""
    num_ingresses: int = Field(default=1, ge=1)
    """Tenants' limits are kept by each of them, so with more a tenant may have as many times."""

    @model_validator(mode="after")
    def _check_ids(self) -> Self:
        ids = [base.model_id for base in self.bases]
        doubled = sorted({model_id for model_id in ids if ids.count(model_id) > 1})
        if doubled:
            raise ValueError(f"bases: two are called {doubled[0]}; give one of them another id")
        return self
