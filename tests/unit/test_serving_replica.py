"""What a replica does with an adapter's files, and what it tells of what went wrong."""

import asyncio
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from serving_worlds import adapters

from s2ft_ray.errors import AdapterError, ConfigError, JobError, ServingError
from s2ft_ray.method import Adapter
from s2ft_ray.registry import ResolvedAdapter
from s2ft_ray.registry.kept import kept_folder
from s2ft_ray.serving import adapter_reader, app
from s2ft_ray.serving.adapter_reader import AdapterReader
from s2ft_ray.serving.bodies import Identity
from s2ft_ray.serving.canary import Canary
from s2ft_ray.serving.engine_stats import Resident
from s2ft_ray.serving.placements import Placements
from s2ft_ray.serving.replica import Replica, refusal
from s2ft_ray.serving.requests import AdapterKey, PromptLogprob
from s2ft_ray.serving.routes import Route, ServedRequest
from s2ft_ray.serving.schemas import CompletionRequest
from s2ft_ray.serving.settings import ServingSettings

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


class Bare(Replica):
    """A replica of which a test puts the parts together."""

    def __del__(self) -> None:  # type: ignore[override]
        """End nothing."""


class StubEngine:
    """Scores every prompt alike."""

    dedicated = None

    def __init__(self, logprob: float, reader: AdapterReader) -> None:
        self.logprob = logprob
        self.reader = reader
        self.dropped: list[AdapterKey] = []

    async def score(
        self, prompt_ids: Sequence[int], _key: AdapterKey, _top: int
    ) -> list[PromptLogprob]:
        return [PromptLogprob(i, self.logprob) for i in prompt_ids]

    async def fetch(self, key: AdapterKey) -> Adapter:
        return self.reader.read(key)

    def residents(self) -> list[Resident]:
        return []

    def drop(self, key: AdapterKey) -> None:
        self.dropped.append(key)


class StubCanary(Canary):
    """Of a merged model that says -1 of every token."""

    def __init__(self) -> None:
        self.prompt_ids = (1, 2, 3)
        self._tolerance = 0.01

    def logprobs(self, _adapter: Adapter) -> list[float]:
        return [-1.0, -1.0]


def bare_replica(reader: AdapterReader, engine: StubEngine) -> Replica:
    replica = Bare.__new__(Bare)
    replica._adapters = reader
    replica._engine = engine  # type: ignore[assignment]
    replica._canary = StubCanary()
    replica._checking = asyncio.Lock()
    replica._placements = Placements(engine, "b", reader.remember, replica._checking)  # type: ignore[arg-type]
    replica._templates = {}
    return replica


@pytest.mark.parametrize(("logprob", "fault"), [(-1.0, None), (-1.5, "canary: token 1")])
def test_an_adapter_that_serves_other_logprobs_than_merged_is_refused(
    reader: AdapterReader, tmp_path: Path, logprob: float, fault: str | None
) -> None:
    ADAPTER.save(tmp_path / "files")
    engine = StubEngine(logprob, reader)
    told = asyncio.run(bare_replica(reader, engine).check(route_to(tmp_path / "files")))
    if fault is None:
        assert told is None
        assert engine.dropped == []
    else:
        assert told is not None
        assert told.startswith(fault)
        assert engine.dropped == [KEY]


def test_a_registry_that_leaves_during_a_check_is_no_fault_of_the_version(
    reader: AdapterReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(_ref: str, _uri: str | None) -> ResolvedAdapter:
        raise JobError("MLflow can't be reached")

    monkeypatch.setattr(adapter_reader, "resolve_adapter", away)
    replica = bare_replica(reader, StubEngine(-1.0, reader))
    with pytest.raises(JobError, match="can't be reached"):
        asyncio.run(replica.check(route_to(tmp_path / "on-another-node")))


def test_without_keys_it_answers_on_loopback_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    client = SimpleNamespace(http_config=SimpleNamespace())
    monkeypatch.setattr(app, "_get_global_client", lambda: client)
    client.http_config.host = "0.0.0.0"
    with pytest.raises(ConfigError, match=r"no_auth: Serve listens on 0\.0\.0\.0"):
        app.Ingress(ServingSettings(no_auth=True), None, {})  # type: ignore[arg-type]
    client.http_config.host = "127.0.0.1"
    app.Ingress(ServingSettings(no_auth=True), None, {})  # type: ignore[arg-type]
