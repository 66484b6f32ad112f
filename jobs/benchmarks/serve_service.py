"""The service as it is deployed, for a while: a registry, a Ray and a Serve of its own on loopback.

One replica of a random base and adapters in a registry, in a temporary folder, without keys.
A stream is one request that is answered token by token.
"""

import asyncio
import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import ray
from mlflow import MlflowClient
from ray import serve
from transformers import PreTrainedModel

from benchmarks.serve_worlds import Shape, build_adapters, build_base
from s2ft_ray.bases import load_tokenizer
from s2ft_ray.config import ModelConfig, parse_config
from s2ft_ray.errors import ServingError
from s2ft_ray.method import Adapter
from s2ft_ray.registry import register_adapter
from s2ft_ray.serving.deployment import deploy
from s2ft_ray.serving.requests import AdapterKey
from s2ft_ray.serving.settings import SERVE_ENV, BaseSettings, ServingSettings

BASE_ID = "bench"
_LISTED_TIMEOUT_S = 120.0
_PARTS = {"ServeReplica": "replica", "ProxyActor": "proxy", "ServeController": "controller"}


@dataclass(frozen=True)
class Service:
    """What runs: where it answers, and what it answers with."""

    url: str
    base: BaseSettings
    model: PreTrainedModel
    """The base again, in this process."""
    adapters: dict[AdapterKey, Adapter]
    """As they are registered; of several versions of a name the last has the alias."""

    def resident_bytes(self) -> dict[str, int]:
        """Return what each process of the service holds of the machine's memory."""
        found: dict[str, int] = {}
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # a worker that ended just now
                title = " ".join(process.cmdline())
                for actor, part in _PARTS.items():
                    if title.startswith(f"ray::{actor}"):
                        # at work its title goes on with the method
                        deployment = title.rpartition(":")[2].partition(".")[0]
                        name = f"{part} {deployment}" if part == "replica" else part
                        found[name] = found.get(name, 0) + process.memory_info().rss
        return found


@contextmanager
def deployed(
    shape: Shape, threads: int, names: Sequence[str], scale: float = 0.002
) -> Iterator[Service]:
    """Bring the service up with an adapter for each of `names`; one that comes again is a version.

    `scale` is of the deltas.
    """
    # short: Ray's sockets lie in it, and their paths are limited to 107 bytes
    with tempfile.TemporaryDirectory(prefix="s2ft-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with _home(folder / "home"):
            uri = f"sqlite:///{folder / 'home' / 'mlflow.db'}"
            model, adapters = _make_world(folder, uri, shape, names, scale)
            base = BaseSettings(
                model=ModelConfig(name_or_path=str(folder / "base")),
                id=BASE_ID,
                num_cpus=threads,  # Ray gives a replica as many threads
            )
            settings = ServingSettings(bases=[base], no_auth=True, poll_s=0.5, tracking_uri=uri)
            with _own_ray(folder / "ray", threads):
                service = Service(deploy(settings, _free_port()), base, model, adapters)
                asyncio.run(_wait_until_listed(service))
                yield service


@contextmanager
def _home(folder: Path) -> Iterator[None]:
    """Give a context in which the service's state is in `folder`."""
    before = os.environ.get("S2FT_HOME")
    folder.mkdir()
    os.environ["S2FT_HOME"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["S2FT_HOME"]
        else:
            os.environ["S2FT_HOME"] = before


@contextmanager
def _own_ray(folder: Path, num_cpus: int) -> Iterator[None]:
    """Give a context with a Ray that nobody else uses, its processes set as `s2ft up` sets them."""
    os.environ.update(SERVE_ENV)
    ray.init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        _temp_dir=str(folder),
    )
    try:
        yield
    finally:
        serve.shutdown()
        ray.shutdown()


@dataclass
class Answer:
    """What came of one stream."""

    sent_at: float
    status: int = 0
    events: list[tuple[float, dict[str, Any]]] = field(default_factory=list)
    """When each event came, in seconds, and what it was."""
    fault: str | None = None

    @property
    def text(self) -> str:
        """The answer's text."""
        return "".join(c["text"] for _, event in self.events for c in event.get("choices", ()))

    @property
    def fingerprints(self) -> set[str]:
        """Who answered."""
        return {event["system_fingerprint"] for _, event in self.events if event.get("choices")}

    @property
    def num_tokens(self) -> int:
        """How many tokens the service says it has sent."""
        return sum((e.get("usage") or {}).get("completion_tokens", 0) for _, e in self.events)


async def stream(
    session: aiohttp.ClientSession, url: str, model: str, prompt: Sequence[int], num_tokens: int
) -> Answer:
    """Ask for a greedy completion as a stream, and take it to its end."""
    body = _body(model, prompt, num_tokens) | {
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    answer = Answer(time.perf_counter())
    ended = False
    try:
        async with session.post(f"{url}/v1/completions", json=body) as reply:
            answer.status = reply.status
            if reply.status != 200:
                answer.fault = (await reply.text())[:300]
                return answer
            async for line in reply.content:
                if line.startswith(b"data: [DONE]"):
                    ended = True
                elif line.startswith(b"data: "):
                    event = json.loads(line[6:])
                    answer.events.append((time.perf_counter(), event))
                    if "error" in event:
                        answer.fault = str(event["error"])
    except (aiohttp.ClientError, TimeoutError) as error:
        answer.fault = f"{type(error).__name__}: {error}"
    if answer.fault is None and not ended:
        answer.fault = "the stream broke off"
    return answer


async def whole(
    session: aiohttp.ClientSession, url: str, model: str, prompt: Sequence[int], num_tokens: int
) -> dict[str, Any]:
    """Ask for a greedy completion in one body. Raises ServingError for anything else."""
    body = _body(model, prompt, num_tokens)
    async with session.post(f"{url}/v1/completions", json=body) as reply:
        if reply.status != 200:
            raise ServingError(f"{model}: {reply.status} {await reply.text()}")
        found: dict[str, Any] = await reply.json()
        return found


def client_session() -> aiohttp.ClientSession:
    """Return a session that opens as many connections as it is asked for."""
    connector = aiohttp.TCPConnector(limit=0)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=600))


def _body(model: str, prompt: Sequence[int], num_tokens: int) -> dict[str, Any]:
    return {"model": model, "prompt": list(prompt), "max_tokens": num_tokens, "temperature": 0}


def _make_world(
    folder: Path, uri: str, shape: Shape, names: Sequence[str], scale: float
) -> tuple[PreTrainedModel, dict[AdapterKey, Adapter]]:
    """Write the base and register the adapters."""
    tokenizer = load_tokenizer(ModelConfig())
    model = build_base(shape, len(tokenizer))
    # random weights mean nothing: no token of theirs shall end an answer before its time
    tokenizer.eos_token = None
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    client = MlflowClient(uri, uri)
    experiment = client.create_experiment("bench", (folder / "home" / "mlartifacts").as_uri())
    registered = {}
    built = build_adapters(model, shape, len(names), scale).values()
    for number, (name, adapter) in enumerate(zip(names, built, strict=True)):
        tenant, _, model_name = name.partition(".")
        document = {"tenant": tenant, "name": model_name, "data": {"train": "none.jsonl"}}
        config = parse_config({**document, "tracking": {"uri": uri}})
        place = folder / f"adapter-{number}"
        adapter.save(place)
        run_id = client.create_run(experiment).info.run_id
        version = register_adapter(place, config, mlflow_run_id=run_id).version
        registered[AdapterKey(name, str(version), adapter.fingerprint)] = adapter
    return model, registered


async def _wait_until_listed(service: Service) -> None:
    """Wait until all adapters take traffic."""
    wanted, listed = {key.name for key in service.adapters}, set[str]()
    deadline = time.monotonic() + _LISTED_TIMEOUT_S
    async with client_session() as session:
        while time.monotonic() < deadline:
            async with session.get(f"{service.url}/v1/models") as reply:
                if reply.status == 200:
                    listed = {model["id"] for model in (await reply.json())["data"]}
                    if wanted <= listed:
                        return
            await asyncio.sleep(0.5)
    raise ServingError(f"after {_LISTED_TIMEOUT_S:.0f} s the service lists {sorted(listed)} only")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
