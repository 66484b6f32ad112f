"""From a base model's name to the local folder that holds its files.

Invariant: every base is read from a local folder, whatever its name, so there is one way to
check it and one set of faults. The hub is asked once, for at most ``HUB_TIMEOUT_S``; where it
doesn't answer, its local cache is used, and where that is empty the run ends at once.
"""

import json
import os
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: its client's
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils._validators import validate_repo_id

from s2ft_ray.config import ModelConfig
from s2ft_ray.errors import ConfigError

EMBEDDED_SCHEME = "s2ft://"
EMBEDDED = {"s2ft://tiny": Path(__file__).parent / "tiny"}
HUB_TIMEOUT_S = 10.0
PICKLED = (".bin", ".pt", ".pth")
SETTINGS_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]
WEIGHT_FILES = ["model*.safetensors"]  # not Mistral's second copy, consolidated.safetensors


def base_name(name_or_path: str) -> str:
    """Return the name that lineage keeps: a folder's absolute path, other names unchanged."""
    if name_or_path in EMBEDDED:
        return name_or_path
    return resolve_base(name_or_path)


def resolve_base(name_or_path: str) -> str:
    """Return the folder of an embedded or local base, absolute; a hub name unchanged.

    Raises ConfigError for an unknown embedded name, a path that doesn't exist, and a name that
    the hub can't have.
    """
    if name_or_path.startswith(EMBEDDED_SCHEME):
        if name_or_path not in EMBEDDED:
            known = ", ".join(EMBEDDED)
            raise ConfigError(f"model.name_or_path: {name_or_path} is not embedded; known: {known}")
        return str(EMBEDDED[name_or_path])
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return os.path.abspath(path)
    if path.exists():
        raise ConfigError(
            f"model.name_or_path: {name_or_path} is a file; name the folder that holds config.json"
        )
    if _is_path(name_or_path):
        raise ConfigError(
            f"model.name_or_path: the folder {name_or_path} doesn't exist"
            f" (looked for {os.path.abspath(path)}); correct the path, or name a model of the hub"
        )
    return name_or_path


def _is_path(name: str) -> bool:
    if name.startswith((".", "/", "~")):
        return True
    try:
        validate_repo_id(name)
    except HFValidationError:
        return True
    return False


def local_folder(model: ModelConfig, *, weights: bool) -> Path:
    """Return the folder with the base's files, downloading a hub name's; checks that they exist."""
    base = resolve_base(model.name_or_path)
    folder = Path(base) if os.path.isabs(base) else _download(model, weights=weights)
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"model.name_or_path: {model.name_or_path} is no model folder, it has no config.json;"
            " name a folder that save_pretrained wrote"
        )
    if weights:
        _check_weights(model.name_or_path, folder)
    return folder


def find_folder(name_or_path: str, revision: str | None = None) -> Path | None:
    """Return the folder of a base whose files are on this machine already, else None."""
    try:
        base = resolve_base(name_or_path)
        if os.path.isabs(base):
            return Path(base)
        patterns = SETTINGS_FILES + WEIGHT_FILES
        return Path(
            snapshot_download(
                base, revision=revision, allow_patterns=patterns, local_files_only=True
            )
        )
    except (ConfigError, LocalEntryNotFoundError):
        return None


def _download(model: ModelConfig, *, weights: bool) -> Path:
    name, revision = model.name_or_path, model.revision
    label = f"model.name_or_path: {name}"
    patterns = SETTINGS_FILES + WEIGHT_FILES * weights + ["*.py"] * model.trust_remote_code
    try:
        HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT_S)
        reachable = True
    except RevisionNotFoundError as error:
        raise ConfigError(f"model.revision: {name} has no revision {revision}") from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"{label} is not a folder here and no model of the hub that you may read;"
            " correct the name, or log in with `hf auth login` if it is private"
        ) from error
    except (HTTPError, OfflineModeIsEnabled):
        reachable = False
    try:
        folder = snapshot_download(
            name, revision=revision, allow_patterns=patterns, local_files_only=not reachable
        )
    except LocalEntryNotFoundError as error:
        raise ConfigError(
            f"{label} is not a folder here and not in the hub's local cache, and the hub can't be"
            " reached; correct the path, or download the model and name its folder"
        ) from error
    except HfHubHTTPError as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{label}: the hub refused the files: {reason}") from error
    return Path(folder)


def _check_weights(name: str, folder: Path) -> None:
    label = f"model.name_or_path: {name}"
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{label}: {index.name} is damaged: {error}") from error
        missing = sorted(shard for shard in shards if not (folder / shard).is_file())
        if missing:
            raise ConfigError(f"{label}: weights are missing: {', '.join(missing)}; copy them too")
        return
    pickled = sorted(
        path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth")
    )
    if pickled:
        raise ConfigError(
            f"{label} has only pickled weights ({pickled[0]}), and only safetensors are read;"
            " convert it once with save_pretrained"
        )
    raise ConfigError(f"{label} has no weights; model.safetensors belongs beside its config.json")
