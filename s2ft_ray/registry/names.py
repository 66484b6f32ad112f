"""What a registered adapter is called: ``<tenant>.<name>``, ``...@<alias>``, ``...:<version>``.

Invariant: a ``ModelRef`` that exists is a name that this project could have given. MLflow itself
takes ``.acme`` or ``acme@x`` as names, so every name is checked here before MLflow sees it.
"""

import re
from dataclasses import dataclass

from s2ft_ray.config import NAME_PATTERN, RESERVED_ALIAS
from s2ft_ray.errors import ConfigError

DEFAULT_ALIAS = "champion"
EVERYONE = "*"
"""In place of the tenants that a model is shared with: all of them."""
_PART = re.compile(NAME_PATTERN.removesuffix("$") + r"\Z")
_ALIAS = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,62}\Z")
_FORMS = "write <tenant>.<name>, <tenant>.<name>@<alias> or <tenant>.<name>:<version>"


@dataclass(frozen=True)
class ModelRef:
    """A registered model, by alias or by version; neither: by the alias ``champion``."""

    name: str
    alias: str | None = None
    version: int | None = None

    def __str__(self) -> str:
        if self.version is not None:
            return f"{self.name}:{self.version}"
        return self.name if self.alias is None else f"{self.name}@{self.alias}"


@dataclass(frozen=True)
class AliasMove:
    """An alias that was moved; `before` is None where it is new."""

    name: str
    alias: str
    version: int
    before: int | None


def parse_ref(ref: str) -> ModelRef:
    """Read a reference, in this project's form or as MLflow's ``models:/`` URI.

    Raises ConfigError where the name, alias or version is not one that could exist.
    """
    text = ref
    if ref.startswith("models:/"):
        text = ref.removeprefix("models:/").lstrip("/")
        text = ":".join(text.split("/")) if "@" not in text else text
    name, at, alias = text.partition("@")
    name, colon, version = name.partition(":")
    check_name(name, ref)
    if at and colon:
        raise ConfigError(f"{ref!r} names an alias and a version; {_FORMS}")
    if at:
        check_alias(alias, ref)
        return ModelRef(name, alias=alias)
    if colon:
        if not re.fullmatch(r"[1-9][0-9]{0,8}", version):
            raise ConfigError(f"{ref!r}: {version!r} is no version number; {_FORMS}")
        return ModelRef(name, version=int(version))
    return ModelRef(name)


def check_name(name: str, ref: str | None = None) -> None:
    """Raise ConfigError unless `name` is ``<tenant>.<name>``; `ref` is what the user wrote."""
    parts = name.split(".")
    if len(parts) != 2 or not all(_PART.match(part) for part in parts):
        raise ConfigError(
            f"{name if ref is None else ref!r} names no registered adapter; {_FORMS},"
            " in lower case letters, digits and '-'"
        )


def check_tenant(tenant: str) -> None:
    """Raise ConfigError for a name that no tenant can have."""
    if not _PART.match(tenant):
        raise ConfigError(
            f"{tenant!r} is no tenant's name; write lower case letters, digits and '-'"
        )


def check_alias(alias: str, ref: str | None = None) -> None:
    """Raise ConfigError for an alias that MLflow would refuse or take for something else."""
    shown = f"{alias!r}" if ref is None else f"{ref!r}: {alias!r}"
    if RESERVED_ALIAS.fullmatch(alias):
        raise ConfigError(f"{shown} is reserved by MLflow; take another alias than latest or v<N>")
    if not _ALIAS.match(alias):
        raise ConfigError(
            f"{shown} is no alias; write a letter, then up to 62 letters, digits, '_' or '-'"
        )
