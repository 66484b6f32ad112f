"""A service on a node: adapters, keys, clients that load it, and what can be killed of it."""

import json
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import psutil
from nodes import Node
from serving_parts import BASE, Merged, free_port, make_adapter, register, save_other_base

from s2ft_ray.accounts import Accounts
from s2ft_ray.method import Adapter
from s2ft_ray.node.services import temp_dir

PROMPTS = ["Order 6813 the saw", "Please sort 5 1 9", "Hello, where is", "3 + 4 =", "The fan from"]
TOKENS = 12
MODELS = (
    ("initech.served", 1, "champion"),
    ("globex.served", 1, "champion"),
    ("initech.swapped", 1, "champion"),
    ("initech.swapped", 2, "candidate"),
)
OTHER = "other-base"
_LOG_LINES = 60
PARTS = {
    "a base's replica": "ServeReplica:s2ft:Base-s2ft",
    "the ingress": "ServeReplica:s2ft:Ingress",
    "the watcher": "ServeReplica:s2ft:Watcher",
    "the controller": "ServeController",
    "the proxy": "ProxyActor",
}
"""What Serve runs, by how its processes are titled."""


@dataclass
class Service:
    """The service of a node, its keys, and the adapters that it should be serving."""

    node: Node
    url: str
    keys: dict[str, str]
    adapters: dict[str, Adapter]
    """By name and version."""
    merged: Merged
    folder: Path
    clients: ExitStack
    wanted: dict[tuple[str, str], str] = field(default_factory=dict)

    def client(self, tenant: str = "initech", retries: int = 0) -> openai.OpenAI:
        """Return the stock client with a tenant's key, closed in the end."""
        return self.clients.enter_context(self.passing_client(tenant, retries))

    def passing_client(self, tenant: str, retries: int = 0) -> openai.OpenAI:
        """Return one that its caller closes."""
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=self.keys[tenant], max_retries=retries, timeout=120
        )

    def expected(self, version: str, prompt: str) -> str:
        """Return the merged model's greedy continuation; ``base`` is no adapter's."""
        if (version, prompt) not in self.wanted:
            adapter = self.adapters.get(version)
            text = self.merged.continue_text(adapter, prompt, TOKENS)
            self.wanted[version, prompt] = text
        return self.wanted[version, prompt]

    def ask(self, model: str, prompt: str, tenant: str = "initech", retries: int = 0) -> Any:
        """Return a whole greedy completion."""
        with self.passing_client(tenant, retries) as client:
            return client.completions.create(
                model=model, prompt=prompt, max_tokens=TOKENS, temperature=0
            )

    def s2ft(self, *args: str) -> str:
        """Run a command that has to succeed; return what it prints."""
        done = self.node.s2ft(*args)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def send(self, path: str, body: dict[str, Any] | None = None, tenant: str = "operator") -> Any:
        """Return the JSON of an endpoint that isn't OpenAI's."""
        request = urllib.request.Request(
            f"{self.url}{path}",
            None if body is None else json.dumps(body).encode(),
            {"Authorization": f"Bearer {self.keys[tenant]}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.loads(reply.read())

    def post(self, action: str, body: dict[str, Any]) -> Any:
        """Promote or roll back initech.swapped, as its owner."""
        return self.send(f"/v1/models/initech.swapped/{action}", body, "initech")

    def listed(self, tenant: str) -> list[str]:
        """Return the models that a key may call; none before it is deployed and has read all."""
        try:
            with self.passing_client(tenant) as client:
                return [model.id for model in client.models.list()]
        except (openai.InternalServerError, openai.NotFoundError, openai.APIConnectionError):
            return []

    def running(self) -> int:
        """Return how many requests the adapters answer now."""
        return sum(adapter["running"] for adapter in self.send("/v1/adapters")["data"])

    def wait_for(self, model: str, version: str, timeout_s: float = 240) -> None:
        """Wait until `model` is answered by the adapter `version`."""
        wanted = self.adapters[version].fingerprint
        self.wait_until(lambda: self.ask(model, "x").system_fingerprint == wanted, timeout_s)

    def wait_until(self, holds: Callable[[], bool], timeout_s: float = 240) -> None:
        """Wait; what doesn't come true is told with the end of the service's logs."""
        deadline = time.monotonic() + timeout_s
        while not holds():
            if time.monotonic() > deadline:
                raise AssertionError(f"it doesn't come true\n{self.logs()}")
            time.sleep(0.1)

    def logs(self) -> str:
        """Return the last lines of each part of the service."""
        folder = temp_dir(self.node.home) / "session_latest" / "logs" / "serve"
        parts = []
        for path in sorted(folder.glob("*.log"), key=lambda path: path.stat().st_mtime):
            lines = path.read_text(errors="replace").splitlines()[-_LOG_LINES:]
            parts.append("\n".join([f"--- {path.name}", *lines]))
        return "\n".join(parts)

    def processes(self, title: str) -> list[psutil.Process]:
        """Return the processes of this node's Ray with `title` in their command line."""
        found = []
        for entry in self.node.status()["services"]:
            if entry["name"] != "ray":
                continue
            for child in psutil.Process(entry["pid"]).children(recursive=True):
                try:
                    if title in " ".join(child.cmdline()):
                        found.append(child)
                except psutil.NoSuchProcess:
                    continue
        return found

    def kill(self, part: str) -> None:
        """Kill a part of the service, as a machine's out-of-memory killer would."""
        victims = self.processes(PARTS[part])
        assert victims, f"{part} isn't running"
        victims[0].kill()

    def kill_registry(self) -> None:
        """Kill the MLflow server with all its workers."""
        (pid,) = (it["pid"] for it in self.node.status()["services"] if it["name"] == "mlflow")
        server = psutil.Process(pid)
        family = [*server.children(recursive=True), server]
        for process in family:
            process.kill()
        psutil.wait_procs(family, 20)


Starting = subprocess.CompletedProcess[str]


def serve_by_command(node: Node, port: int, other_base: Path) -> Starting:
    """Serve as one machine does."""
    return node.s2ft("serve", "--base", BASE, "--base", str(other_base), "--port", str(port))


def start_service(
    node: Node,
    folder: Path,
    clients: ExitStack,
    start: Callable[[Node, int, Path], Starting] = serve_by_command,
) -> Service:
    """Register the adapters, make keys, start the service, and wait until it serves them all."""
    adapters = {}
    for seed, (name, version, alias) in enumerate(MODELS):
        adapter = make_adapter(seed + 1, scale=0.3)
        adapters[f"{name}:{version}"] = adapter
        assert register(node, folder / f"{seed}", adapter, name, alias) == version
    accounts = Accounts(f"sqlite:///{node.home / 'scheduler.db'}")
    for tenant in ("initech", "globex"):
        accounts.set_tenant(tenant)
    keys = {tenant: accounts.create_key(tenant).secret for tenant in ("initech", "globex")}
    keys["operator"] = accounts.create_key(None, operator=True).secret
    accounts.close()
    port = free_port()
    save_other_base(folder / OTHER)
    started = start(node, port, folder / OTHER)
    url = f"http://127.0.0.1:{port}"
    service = Service(node, url, keys, adapters, Merged.load(), folder, clients)
    assert started.returncode == 0, f"{started.stderr}\n{service.logs()}"
    # others that were registered on this node are listed too
    names = {BASE, OTHER, "globex.served", "initech.served", "initech.swapped"}
    names.add("initech.swapped@candidate")
    service.wait_until(lambda: names <= set(service.listed("operator")))
    return service


class Load:
    """Clients that ask all the time, half of them streaming, and what they got."""

    def __init__(
        self,
        service: Service,
        models: Sequence[tuple[str, str]],
        num_clients: int = 4,
    ) -> None:
        """`models` are (tenant, model), which each client asks in turns."""
        self.service = service
        self.models = models
        self.answers: list[tuple[str, str, str]] = []
        """(prompt, fingerprint, text) of each whole answer."""
        self.broken: list[tuple[str, str, str]] = []
        """(prompt, text so far, error) of each that broke off."""
        self.counts = [0] * num_clients
        """Whole answers of each client."""
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask, args=(i,), daemon=True) for i in range(num_clients)
        ]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(60)

    def _ask(self, client: int) -> None:
        turn = client
        while not self._over.is_set():
            prompt = PROMPTS[turn % len(PROMPTS)]
            tenant, model = self.models[turn % len(self.models)]
            turn += 1
            time.sleep(0.02)  # two cores serve and test
            text, fingerprints, is_whole = "", set(), False
            try:
                if client % 2:
                    answer = self.service.ask(model, prompt, tenant)
                    text, fingerprints = answer.choices[0].text, {answer.system_fingerprint}
                else:
                    with self.service.passing_client(tenant) as stock:
                        for chunk in stock.completions.create(
                            model=model,
                            prompt=prompt,
                            max_tokens=TOKENS,
                            temperature=0,
                            stream=True,
                        ):
                            text += chunk.choices[0].text
                            fingerprints.add(chunk.system_fingerprint)
                            is_whole |= chunk.choices[0].finish_reason is not None
                    if not is_whole:
                        raise EOFError("the stream ended before its answer")
                (fingerprint,) = fingerprints
                self.answers.append((prompt, str(fingerprint), text))
                self.counts[client] += 1
            except Exception as error:  # noqa: BLE001 - whatever it is, a test looks at it
                self.broken.append((prompt, text, f"{type(error).__name__}: {error}"))
                time.sleep(0.1)

    def wait_for_more(self, count: int, timeout_s: float = 240) -> None:
        """Wait until so many more answers have come."""
        before = len(self.answers)
        self.service.wait_until(lambda: len(self.answers) >= before + count, timeout_s)

    def check(self, *versions: str) -> None:
        """Every whole answer is that of the version which it says, and of one of `versions`."""
        by_fingerprint = {self.service.adapters[v].fingerprint: v for v in versions}
        for prompt, fingerprint, text in self.answers:
            version = by_fingerprint[fingerprint]
            assert text == self.service.expected(version, prompt), (version, prompt)

    def check_broken(self, *versions: str) -> None:
        """What has gone out of every answer that broke off is the beginning of a right one."""
        for prompt, text, error in self.broken:
            wanted = [self.service.expected(version, prompt) for version in versions]
            assert any(whole.startswith(text) for whole in wanted), (prompt, text, error)
