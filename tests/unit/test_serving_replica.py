"""What a replica does with an adapter's files, and what it tells of what went wrong."""

import shutil
from pathlib import Path

import pytest
from serving_worlds import adapters

from s2ft_ray.errors import AdapterError, ConfigError, ServingError
from s2ft_ray.registry import ResolvedAdapter
from s2ft_ray.registry.kept import kept_folder
from s2ft_ray.serving import adapter_reader
from s2ft_ray.serving.adapter_reader import AdapterReader
from s2ft_ray.serving.bodies import Identity
from s2ft_ray.serving.replica import refusal
from s2ft_ray.serving.routes import Route, ServedRequest
from s2ft_ray.serving.schemas import CompletionRequest

KEY, ADAPTER = next(iter(adapters().items()))


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AdapterReader:
    monkeypatch.setenv("S2FT_HOME", str(tmp_path / "home"))
    return AdapterReader("s2ft://tiny", ADAPTER.base.fingerprint, None, 2**30)


def route_to(folder: Path) -> Route:
    return Route("s2ft://tiny", KEY.fingerprint, adapter=KEY, folder=str(folder))


def damage(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def test_a_damaged_copy_is_fetched_again(
    reader: AdapterReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, kept = tmp_path / "original", kept_folder(KEY.name, KEY.version, KEY.fingerprint)
    ADAPTER.save(original)

    def resolve(_ref: str, _uri: str | None) -> ResolvedAdapter:
        if not kept.exists():
            shutil.copytree(original, kept)
        return ResolvedAdapter(KEY.name, 1, None, KEY.fingerprint, kept, {})

    monkeypatch.setattr(adapter_reader, "resolve_adapter", resolve)
    assert reader.read(KEY).fingerprint == KEY.fingerprint
    damage(kept)
    reader.remember(route_to(kept))
    assert reader.read(KEY).fingerprint == KEY.fingerprint


def test_a_damaged_original_is_told_and_left_alone(reader: AdapterReader, tmp_path: Path) -> None:
    ADAPTER.save(tmp_path / "original")
    damage(tmp_path / "original")
    reader.remember(route_to(tmp_path / "original"))
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors"):
        reader.read(KEY)
    assert (tmp_path / "original" / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (MemoryError(), 503, "out of memory"),
        (ServingError("the engine is stuck"), 503, "the engine is stuck"),
        (AdapterError("its files are damaged"), 503, "its files are damaged"),
        (ConfigError("prompt: is empty"), 400, "prompt: is empty"),
        (RuntimeError("secret"), 500, "its id is r-1"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_went_wrong_is_told_by_kind(error: Exception, status: int, told: str) -> None:
    request = CompletionRequest(model="acme.bot", prompt="x")
    served = ServedRequest(request, Route("b", "f"), Identity("i", 0, "acme.bot", "f"), "r-1", "a")
    refused = refusal(error, served)
    assert refused.status == status
    assert told in refused.message
    assert "secret" not in refused.message
