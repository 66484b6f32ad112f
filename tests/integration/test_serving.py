"""Two tenants' adapters behind one base on a real Serve: answers, swaps, faults, fuzz."""

import json
import random
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import hypothesis
import jsonschema
import lm_eval_parts
import openai
import pytest
import schemathesis
from chaos import ASKED, Chaos
from mlflow import MlflowClient
from nodes import BIN, Node
from served_node import OTHER, PROMPTS, TOKENS, Load, Service, start_service
from serving_parts import BASE, Merged, make_adapter, register

from s2ft_ray.bases.folders import EMBEDDED


@pytest.fixture(scope="module")
def service(node: Node, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    # it holds no CPU, and ends with the node
    with ExitStack() as clients:
        yield start_service(node, tmp_path_factory.mktemp("adapters"), clients)


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
    own = {"initech.served", "initech.swapped", "initech.swapped@candidate"}
    assert set(service.listed("initech")) == {BASE, OTHER} | own
    assert set(service.listed("globex")) == {BASE, OTHER, "globex.served"}
    with pytest.raises(openai.NotFoundError) as refused:
        service.ask("globex.served", "x", "initech")
    assert refused.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        service.client("initech").with_options(api_key="s2ft-0-0").models.list()


def test_two_bases_stand_behind_one_ingress(service: Service) -> None:
    merged = Merged.load(str(service.folder / OTHER))
    for prompt in PROMPTS[:2]:
        with ThreadPoolExecutor(2) as pool:
            one, other = pool.map(service.ask, (BASE, OTHER), (prompt, prompt))
        assert one.choices[0].text == service.expected("base", prompt)
        assert other.choices[0].text == merged.continue_text(None, prompt, TOKENS)
        assert one.system_fingerprint != other.system_fingerprint


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


def test_long_prompts_and_long_answers_come_through(service: Service) -> None:
    grpc_default = 4 * 2**20
    client = service.client()
    with pytest.raises(openai.BadRequestError, match="tokens"):
        client.completions.create(model=BASE, prompt="word " * (grpc_default // 4), max_tokens=1)
    prompts = [
        [random.Random(number).randrange(10, 200) for _ in range(500)] for number in range(64)
    ]
    answer = client.with_raw_response.completions.create(
        model=BASE, prompt=prompts, max_tokens=0, echo=True, logprobs=5
    )
    assert len(answer.content) > grpc_default
    logprobs = [choice.logprobs for choice in answer.parse().choices]
    assert [len(each.tokens or ()) for each in logprobs if each] == [500] * 64


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


def test_a_client_that_leaves_ends_its_generation(service: Service) -> None:
    # greedy, this one goes on for ever
    ask = {"model": "initech.swapped@candidate", "prompt": PROMPTS[4], "n": 8, "max_tokens": 450}
    ask["temperature"] = 0
    started = time.monotonic()
    with service.client().completions.create(**ask, stream=True) as stream:
        next(iter(stream))
        assert service.running() == 8
    left = time.monotonic()
    service.wait_until(lambda: service.running() == 0)
    assert time.monotonic() - left < 5 * max(left - started, 0.2)
    with pytest.raises(openai.APITimeoutError):
        service.client().with_options(timeout=0.5).completions.create(**ask)
    service.wait_until(lambda: service.running() == 0, timeout_s=3)


def test_a_promotion_under_load_fails_no_request_and_mixes_no_versions(service: Service) -> None:
    with Load(service, [("initech", "initech.swapped")]) as load:
        service.wait_until(lambda: len(load.answers) > 10)
        moved = {"model": "initech.swapped", "alias": "champion"}
        assert service.post("promote", {"version": 2}) == {**moved, "version": 2, "before": 1}
        service.wait_for("initech.swapped", "initech.swapped:2")
        num_before = len(load.answers)
        service.wait_until(lambda: len(load.answers) > num_before + 10)
        assert service.post("rollback", {}) == {**moved, "version": 1, "before": 2}
        service.wait_for("initech.swapped", "initech.swapped:1")
    assert load.broken == []
    load.check("initech.swapped:1", "initech.swapped:2")
    assert len({fingerprint for _, fingerprint, _ in load.answers}) == 2


@pytest.mark.long
def test_lm_eval_gets_the_merged_models_scores_and_answers(
    service: Service, tmp_path: Path
) -> None:
    folder, key = tmp_path / "tasks", service.keys["initech"]
    lm_eval_parts.write_tasks(folder, PROMPTS, TOKENS)
    model = {"model": "initech.served", "base_url": f"{service.url}/v1/completions"}
    tokenizer = {
        "tokenizer_backend": "huggingface",
        "tokenizer": str(EMBEDDED[BASE]),
        "add_bos_token": "True",
    }
    completed = lm_eval_parts.run(
        folder,
        key,
        "local-completions",
        {**model, **tokenizer},
        ["continue", "choose"],
        "--batch_size=4",
    )
    model["base_url"] = f"{service.url}/v1/chat/completions"
    chatted = lm_eval_parts.run(
        folder, key, "local-chat-completions", model, ["continue"], "--apply_chat_template"
    )
    adapter = service.adapters["initech.served:1"]
    stop = lm_eval_parts.STOP
    for row, prompt in enumerate(PROMPTS):
        text = service.expected("initech.served:1", prompt)
        assert completed["continue"][row]["resps"] == [[text.split(stop)[0]]]
        text = service.merged.chat(adapter, prompt, TOKENS)
        assert chatted["continue"][row]["resps"] == [[text.split(stop)[0]]]
        scores = [float(answers[0][0]) for answers in completed["choose"][row]["resps"]]
        wanted = [service.merged.score(adapter, prompt, end) for end in lm_eval_parts.CHOICES]
        assert scores == pytest.approx(wanted, abs=1e-3)


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
    service.wait_until(lambda: reason in registry.get_model_version("initech.swapped", bad).tags)
    assert "fingerprint" in registry.get_model_version("initech.swapped", bad).tags[reason]
    wanted = service.adapters["initech.swapped:1"].fingerprint
    assert service.ask("initech.swapped", "x").system_fingerprint == wanted
    with pytest.raises(openai.NotFoundError, match="fingerprint"):
        service.ask(f"initech.swapped:{bad}", "x")
    service.post("rollback", {})
    assert service.ask("initech.swapped", "x").system_fingerprint == wanted


def test_a_killed_replica_costs_no_answer_that_had_not_begun(service: Service) -> None:
    with Load(service, [("initech", "initech.served")]) as load:
        load.wait_for_more(10)
        service.kill("a base's replica")
        load.wait_for_more(10)
    load.check("initech.served:1")
    load.check_broken("initech.served:1")
    for _, text, error in load.broken:
        assert "died in the middle" in error
        assert text


def test_nothing_wrong_goes_out_while_its_parts_die_and_a_version_goes_live(
    service: Service,
) -> None:
    with Load(service, ASKED) as load:
        chaos = Chaos(service, load, random.Random(0))
        assert chaos.round(1, ["replica", "proxy", "promotion"]) == []
        assert chaos.round(2, ["ingress"]) == []
        assert chaos.round(3, ["unread"]) == []
    service.post("rollback", {})
    service.wait_for("initech.swapped", "initech.swapped:1")


def test_what_serves_outlives_its_controller_its_watcher_and_the_registry(service: Service) -> None:
    asked = [("initech", "initech.served"), ("globex", "globex.served")]
    with Load(service, asked) as load:
        load.wait_for_more(10)
        service.kill("the controller")
        service.kill("the watcher")
        with pytest.raises((openai.NotFoundError, openai.InternalServerError)) as refused:
            service.ask("initech.served:9", "x")
        assert refused.value.status_code in (404, 503)
        load.wait_for_more(20)
        service.kill_registry()
        load.wait_for_more(20)
        with pytest.raises(openai.InternalServerError, match=r"can't be looked up|can't be used"):
            service.ask("initech.served:7", "x")
        service.s2ft("up")
        service.wait_until(lambda: "globex.served" in service.listed("globex"))
        load.wait_for_more(10)
    assert load.broken == []
    load.check("initech.served:1", "globex.served:1")


def test_a_damaged_file_is_refused_by_name(service: Service) -> None:
    folder = service.folder / "damaged"
    version = register(service.node, folder, make_adapter(9), "initech.served", "trial")
    uri = service.node.env["MLFLOW_TRACKING_URI"]
    source = MlflowClient(uri, uri).get_model_version_download_uri("initech.served", str(version))
    (file,) = Path(source.removeprefix("file://")).rglob("adapter_model.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(openai.NotFoundError, match="adapter_model"):
        service.ask(f"initech.served:{version}", "x")
    assert service.ask("initech.served", PROMPTS[0]).choices[0].text == service.expected(
        "initech.served:1", PROMPTS[0]
    )


def test_a_dedicated_base_answers_for_one_adapter_and_comes_back(service: Service) -> None:
    before = service.ask(BASE, PROMPTS[0]).choices[0].text
    place = "/v1/models/initech.served/place"
    service.send(place, {"placement": "dedicated"})

    def placements() -> dict[str, str]:
        return {it["name"]: it["placement"] for it in service.send("/v1/adapters")["data"]}

    service.wait_until(lambda: placements().get("initech.served") == "dedicated")
    answer = service.ask("initech.served", PROMPTS[0]).choices[0].text
    assert answer == service.expected("initech.served:1", PROMPTS[0])
    with pytest.raises(openai.InternalServerError, match=r"dedicated to initech\.served"):
        service.ask(BASE, "x")
    service.send(place, {"placement": "pinned"})
    service.wait_until(lambda: placements().get("initech.served") == "pinned")
    assert service.ask(BASE, PROMPTS[0]).choices[0].text == before
    service.send(place, {"placement": None})


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

    service.wait_until(lambda: "ray_s2ft_completion_tokens_total{" in metrics())
    lines = metrics().splitlines()
    counted = [line for line in lines if line.startswith("ray_s2ft_requests_total{")]
    assert any('model="initech.swapped"' in line and 'tenant="initech"' in line for line in counted)
    assert not any(key in line for line in lines for key in service.keys.values())
    for wanted in ('event="load"', 'event="hit"', 'tier="device"'):
        owned = ("ray_s2ft_adapter_", 'model="initech.served"', 'tenant="initech"', wanted)
        assert any(all(part in line for part in owned) for line in lines), wanted

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
