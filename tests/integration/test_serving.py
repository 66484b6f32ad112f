"""Two tenants' adapters behind one base on a real Serve: answers, swaps, faults, fuzz."""

import json
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import jsonschema
import openai
import psutil
import pytest
import schemathesis
from mlflow import MlflowClient
from nodes import BIN, Node
from serving_parts import BASE, Merged, free_port, make_adapter, register

from s2ft_ray.accounts import Accounts
from s2ft_ray.method import Adapter

PROMPTS = ["Order 6813 the saw", "Please sort 5 1 9", "Hello, where is", "3 + 4 =", "The fan from"]
TOKENS = 12


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
    wanted: dict[tuple[str, str], str] = field(default_factory=dict)

    def client(self, tenant: str = "initech", retries: int = 0) -> openai.OpenAI:
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
        return self.client(tenant, retries).completions.create(
            model=model, prompt=prompt, max_tokens=TOKENS, temperature=0
        )

    def s2ft(self, *args: str) -> str:
        done = self.node.s2ft(*args)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def post(self, action: str, body: dict[str, Any]) -> Any:
        """Promote or roll back initech.swapped, as its owner."""
        request = urllib.request.Request(
            f"{self.url}/v1/models/initech.swapped/{action}",
            json.dumps(body).encode(),
            {"Authorization": f"Bearer {self.keys['initech']}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.loads(reply.read())

    def wait_for(self, model: str, version: str, timeout_s: float = 240) -> None:
        """Wait until `model` is answered by the adapter `version`."""
        wanted = self.adapters[version].fingerprint
        wait_until(lambda: self.ask(model, "x").system_fingerprint == wanted, timeout_s)


def wait_until(holds: Callable[[], bool], timeout_s: float = 240) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "it doesn't come true"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def service(node: Node, tmp_path_factory: pytest.TempPathFactory) -> Service:
    folder = tmp_path_factory.mktemp("adapters")
    adapters = {}
    for seed, (name, version, alias) in enumerate(
        [
            ("initech.served", 1, "champion"),
            ("globex.served", 1, "champion"),
            ("initech.swapped", 1, "champion"),
            ("initech.swapped", 2, "candidate"),
        ]
    ):
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
    started = node.s2ft("serve", "--base", BASE, "--port", str(port))
    assert started.returncode == 0, started.stderr
    url = f"http://127.0.0.1:{port}"
    service = Service(node, url, keys, adapters, Merged.load(), folder)
    # others that were registered on this node are listed too
    names = {
        BASE,
        "globex.served",
        "initech.served",
        "initech.swapped",
        "initech.swapped@candidate",
    }
    wait_until(lambda: names <= set(listed(service, "operator")))
    return service  # it holds no CPU, and ends with the node


def listed(service: Service, tenant: str) -> list[str]:
    try:
        return [model.id for model in service.client(tenant).models.list()]
    except openai.InternalServerError:  # before the first pass over the registry
        return []


def test_two_tenants_adapters_and_the_base_answer_at_once_as_merged(service: Service) -> None:
    asked = [
        (tenant, model, version, prompt)
        for prompt in PROMPTS
        for tenant, model, version in (
            ("initech", "initech.served", "initech.served:1"),
            ("globex", "globex.served", "globex.served:1"),
            ("initech", BASE, "base"),
            ("initech", "initech.swapped@candidate", "initech.swapped:2"),
            ("initech", "initech.swapped:1", "initech.swapped:1"),
        )
    ]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda a: service.ask(a[1], a[3], a[0]), asked))
    for (_, model, version, prompt), answer in zip(asked, answers, strict=True):
        assert answer.choices[0].text == service.expected(version, prompt), (model, prompt)
        if version in service.adapters:
            assert answer.system_fingerprint == service.adapters[version].fingerprint
    assert len({answer.choices[0].text for answer in answers}) > len(PROMPTS)


def test_a_tenant_lists_and_calls_its_own_alone(service: Service) -> None:
    own = [BASE, "initech.served", "initech.swapped", "initech.swapped@candidate"]
    assert listed(service, "initech") == own
    assert listed(service, "globex") == [BASE, "globex.served"]
    with pytest.raises(openai.NotFoundError) as refused:
        service.ask("globex.served", "x", "initech")
    assert refused.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{service.url}/v1", api_key="s2ft-0-0", max_retries=0).models.list()


def test_a_stream_is_the_whole_answer_in_pieces(service: Service) -> None:
    client = service.client()
    ask = {"model": "initech.served", "prompt": PROMPTS[0], "max_tokens": TOKENS, "temperature": 0}
    chunks = list(
        client.completions.create(**ask, stream=True, stream_options={"include_usage": True})
    )
    whole = client.completions.create(**ask)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage
    assert {chunk.system_fingerprint for chunk in chunks} == {whole.system_fingerprint}


def test_a_chat_answers_as_the_merged_model(service: Service) -> None:
    text = "My drill arrived wet, order 6965. What is the order number?"
    answer = service.client().chat.completions.create(
        model="initech.served",
        messages=[{"role": "user", "content": text}],
        max_completion_tokens=TOKENS,
        temperature=0,
    )
    adapter = service.adapters["initech.served:1"]
    assert answer.choices[0].message.content == service.merged.chat(adapter, text, TOKENS)


def test_a_seed_gives_the_same_different_answers_again(service: Service) -> None:
    ask = {"model": BASE, "prompt": PROMPTS[2], "n": 4, "seed": 5, "temperature": 1.5}
    first, second = (service.client().completions.create(**ask, max_tokens=8) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in second.choices]
    assert len(set(texts)) > 1


def test_logprobs_of_an_echoed_prompt_are_those_of_the_answer(service: Service) -> None:
    client = service.client()
    ask = {"model": "initech.served", "temperature": 0, "logprobs": 1}
    answer = client.completions.create(prompt=PROMPTS[0], max_tokens=4, **ask)
    told = answer.choices[0].logprobs
    assert told is not None
    whole = PROMPTS[0] + answer.choices[0].text
    scored = client.completions.create(prompt=whole, max_tokens=1, echo=True, **ask)
    again = scored.choices[0].logprobs
    assert again is not None
    assert again.tokens is not None
    if again.tokens[-5:-1] == told.tokens:  # the text's own tokens need not be those generated
        assert again.token_logprobs[-5:-1] == pytest.approx(told.token_logprobs, abs=1e-3)
    assert all(value is None or value <= 0 for value in again.token_logprobs or [])


def test_a_stop_text_cuts_the_answer(service: Service) -> None:
    text = service.expected("initech.served:1", PROMPTS[1])
    stop = text[2:5]
    answer = service.client().completions.create(
        model="initech.served", prompt=PROMPTS[1], max_tokens=TOKENS, temperature=0, stop=[stop]
    )
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_an_answer_follows_its_json_schema(service: Service) -> None:
    schema = {
        "type": "object",
        "properties": {"order": {"type": "integer"}, "late": {"type": "boolean"}},
        "required": ["order", "late"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "order", "schema": schema}}
    answer = service.client().chat.completions.create(
        model="initech.served",
        messages=[{"role": "user", "content": "Order 4973 is late"}],
        response_format=form,  # type: ignore[arg-type]
        max_tokens=200,
        temperature=0,
    )
    choice = answer.choices[0]
    if choice.finish_reason == "stop":  # a number may go on for as long as it may
        jsonschema.validate(json.loads(choice.message.content or ""), schema)
    assert (choice.message.content or "").startswith('{"')
    with pytest.raises(openai.BadRequestError, match="json_schema"):
        service.client().chat.completions.create(
            model=BASE,
            messages=[{"role": "user", "content": "x"}],
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "nothing"}},
            },
        )


class Load:
    """Clients that ask all the time, half of them streaming, and what they got."""

    def __init__(self, service: Service, model: str, num_clients: int = 4) -> None:
        self.service = service
        self.model = model
        self.answers: list[tuple[str, str, str]] = []
        """(prompt, fingerprint, text) of each whole answer."""
        self.broken: list[tuple[str, str, str]] = []
        """(prompt, text so far, error) of each that broke off."""
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
            turn += 1
            time.sleep(0.02)  # two cores serve and test
            text, fingerprints = "", set()
            try:
                if client % 2:
                    answer = self.service.ask(self.model, prompt)
                    text, fingerprints = answer.choices[0].text, {answer.system_fingerprint}
                else:
                    for chunk in self.service.client().completions.create(
                        model=self.model,
                        prompt=prompt,
                        max_tokens=TOKENS,
                        temperature=0,
                        stream=True,
                    ):
                        text += chunk.choices[0].text
                        fingerprints.add(chunk.system_fingerprint)
                (fingerprint,) = fingerprints
                self.answers.append((prompt, str(fingerprint), text))
            except openai.APIError as error:
                self.broken.append((prompt, text, str(error)))

    def check(self, *versions: str) -> None:
        """Every whole answer is that of the version which it says, and of one of `versions`."""
        by_fingerprint = {self.service.adapters[v].fingerprint: v for v in versions}
        for prompt, fingerprint, text in self.answers:
            version = by_fingerprint[fingerprint]
            assert text == self.service.expected(version, prompt), (version, prompt)


def running(service: Service) -> int:
    request = urllib.request.Request(
        f"{service.url}/v1/adapters",
        headers={"Authorization": f"Bearer {service.keys['operator']}"},
    )
    with urllib.request.urlopen(request, timeout=30) as reply:
        return sum(adapter["running"] for adapter in json.loads(reply.read())["data"])


def test_a_client_that_leaves_ends_its_generation(service: Service) -> None:
    # greedy, this one goes on for ever
    ask = {"model": "initech.swapped@candidate", "prompt": PROMPTS[4], "n": 8, "max_tokens": 450}
    ask["temperature"] = 0
    started = time.monotonic()
    with service.client().completions.create(**ask, stream=True) as stream:
        next(iter(stream))
        assert running(service) == 8
    left = time.monotonic()
    wait_until(lambda: running(service) == 0)
    assert time.monotonic() - left < 5 * max(left - started, 0.2)
    with pytest.raises(openai.APITimeoutError):
        service.client().with_options(timeout=0.5).completions.create(**ask)
    wait_until(lambda: running(service) == 0, timeout_s=3)


def test_a_promotion_under_load_fails_no_request_and_mixes_no_versions(service: Service) -> None:
    with Load(service, "initech.swapped") as load:
        wait_until(lambda: len(load.answers) > 10)
        moved = {"model": "initech.swapped", "alias": "champion"}
        assert service.post("promote", {"version": 2}) == {**moved, "version": 2, "before": 1}
        service.wait_for("initech.swapped", "initech.swapped:2")
        num_before = len(load.answers)
        wait_until(lambda: len(load.answers) > num_before + 10)
        assert service.post("rollback", {}) == {**moved, "version": 1, "before": 2}
        service.wait_for("initech.swapped", "initech.swapped:1")
    assert load.broken == []
    load.check("initech.swapped:1", "initech.swapped:2")
    assert len({fingerprint for _, fingerprint, _ in load.answers}) == 2


def test_a_version_that_fails_its_check_takes_no_traffic(service: Service) -> None:
    # the server refuses a local path as a source that isn't its run's; its database doesn't
    uri = f"sqlite:///{service.node.home / 'mlflow.db'}"
    registry = MlflowClient(uri, uri)
    good = registry.get_model_version("initech.swapped", "1")
    lie = {**good.tags, "fingerprint": "0" * 64}
    bad = str(
        registry.create_model_version(
            "initech.swapped", good.source, run_id=good.run_id, tags=lie
        ).version
    )
    promoted = service.s2ft("promote", "initech.swapped", bad)
    assert promoted == f"initech.swapped@champion is version {bad}, was 1\n"
    reason = "s2ft.rejected"
    wait_until(lambda: reason in registry.get_model_version("initech.swapped", bad).tags)
    assert "fingerprint" in registry.get_model_version("initech.swapped", bad).tags[reason]
    wanted = service.adapters["initech.swapped:1"].fingerprint
    assert service.ask("initech.swapped", "x").system_fingerprint == wanted
    with pytest.raises(openai.NotFoundError, match="fingerprint"):
        service.ask(f"initech.swapped:{bad}", "x")
    service.post("rollback", {})
    assert service.ask("initech.swapped", "x").system_fingerprint == wanted


def replica_pids(service: Service) -> list[int]:
    family = [
        child
        for entry in service.node.status()["services"]
        if entry["name"] == "ray"
        for child in psutil.Process(entry["pid"]).children(recursive=True)
    ]
    title = "ServeReplica:s2ft:Base"
    return [process.pid for process in family if title in " ".join(process.cmdline())]


def test_a_killed_replica_costs_no_answer_that_had_not_begun(service: Service) -> None:
    with Load(service, "initech.served") as load:
        wait_until(lambda: len(load.answers) > 10)
        (pid,) = replica_pids(service)
        psutil.Process(pid).kill()
        num_before = len(load.answers)
        wait_until(lambda: len(load.answers) > num_before + 10, timeout_s=240)
    load.check("initech.served:1")
    for prompt, text, error in load.broken:
        assert "died in the middle" in error
        assert text
        assert service.expected("initech.served:1", prompt).startswith(text)


def test_nothing_that_the_description_allows_makes_it_fail(service: Service) -> None:
    headers = {"Authorization": f"Bearer {service.keys['initech']}"}
    schema = schemathesis.openapi.from_url(f"{service.url}/openapi.json")
    statuses: set[int] = set()
    for operation in schema.get_all_operations():
        if operation.ok().path == "/metrics":
            continue

        @hypothesis.given(case=operation.ok().as_strategy(), known=hypothesis.strategies.booleans())
        @hypothesis.settings(
            max_examples=12,
            deadline=None,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        def fuzz(case: Any, known: bool) -> None:
            if isinstance(case.body, dict) and known:
                case.body["model"] = BASE
                case.body["max_tokens"] = 2
            reply = case.call(headers=headers)
            statuses.add(reply.status_code)
            assert reply.status_code < 500, (case.body, reply.text)
            assert "," not in reply.headers["x-request-id"]
            if reply.status_code >= 400:
                assert set(reply.json()["error"]) == {"message", "type", "param", "code"}

        fuzz()
    assert 400 in statuses


def test_the_operator_sees_metrics_and_adapters(service: Service) -> None:
    def metrics() -> str:
        request = urllib.request.Request(
            f"{service.url}/metrics",
            headers={"Authorization": f"Bearer {service.keys['operator']}"},
        )
        with urllib.request.urlopen(request, timeout=30) as reply:
            return str(reply.read().decode())

    wait_until(lambda: "ray_s2ft_completion_tokens_total{" in metrics())
    lines = metrics().splitlines()
    counted = [line for line in lines if line.startswith("ray_s2ft_requests_total{")]
    assert any('model="initech.swapped"' in line and 'tenant="initech"' in line for line in counted)
    assert not any(key in line for line in lines for key in service.keys.values())

    command = [str(BIN / "s2ft"), "adapters", "list", "--json", "--url", service.url]
    shown = subprocess.run(
        command,
        env={**service.node.env, "S2FT_API_KEY": service.keys["operator"]},
        capture_output=True,
        text=True,
        check=True,
    )
    served = {adapter["name"]: adapter for adapter in json.loads(shown.stdout)}
    assert served["initech.served"]["tier"] == "device"
    assert served["initech.served"]["bytes"] > 0
