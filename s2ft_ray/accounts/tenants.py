"""A tenant's claims on the cluster and its limits."""

from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from s2ft_ray.config import NAME_PATTERN
from s2ft_ray.errors import ConfigError


def _check_root(root: str) -> str:
    if not (root.startswith("/") or "://" in root):
        raise ValueError(f"{root!r} is neither an absolute path nor a URL")
    return root


class Tenant(BaseModel):
    """What a tenant may claim. None means: no limit."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    name: str = Field(pattern=NAME_PATTERN)
    weight: float = Field(default=1.0, gt=0, le=1e6)
    """Its share of a contended cluster, relative to the other tenants' weights."""
    quota: int = Field(default=0, ge=0)
    """Workers that it is guaranteed: lent while idle, reclaimed when asked for."""
    max_workers: int | None = Field(default=None, ge=1)
    """Workers that it may never pass."""
    priority_cap: int | None = None
    """The highest priority that it may ask for."""
    max_queued: int | None = Field(default=None, ge=1)
    """Jobs that it may have waiting."""
    data_roots: tuple[Annotated[str, AfterValidator(_check_root)], ...] = ()
    """Folders or URLs that its data must lie in; none: its jobs' data isn't limited."""
    max_concurrent_requests: int | None = Field(default=None, ge=1)
    """Served requests at once."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    """Served requests in any minute."""

    @classmethod
    def parse(cls, **values: Any) -> Self:
        """Build a tenant. Raises ConfigError with one fault for each value that can't be."""
        try:
            return cls(**values)
        except ValidationError as error:
            raise ConfigError(
                *(
                    f"tenant {values.get('name')}: {'.'.join(map(str, fault['loc']))}:"
                    f" {fault['msg'].removeprefix('Value error, ')} (got {fault['input']!r})"
                    for fault in error.errors()
                )
            ) from None
