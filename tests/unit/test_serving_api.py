"""OpenAI's endpoints with the stock client: forms, refusals, keys, operators."""

import asyncio
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import openai
import pytest
from serving_fakes import (
    BASE,
    FakeBase,
    Parrot,
    adapter_route,
    make_catalog,
)
from serving_site import ACME, CHAT, GLOBEX, GOOD, HELLO, Site, served

from s2ft_ray.serving.boundary import MAX_BODY_BYTES
from s2ft_ray.serving.catalog import CatalogModel


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with served() as site:
        yield site


def test_a_completion_has_openais_form(site: Site) -> None:
    answer = site.client().completions.create(model="acme.bot", prompt="Say", max_tokens=50)
    assert answer.choices[0].text == "one two three"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.system_fingerprint == "acme.bot-1"
    assert answer.model == "acme.bot"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + len(site.engine.ids) + 1
    assert answer._request_id


def test_a_chat_streams_the_role_then_the_text_then_the_usage(site: Site) -> None:
    stream = site.client().chat.completions.create(
        model=BASE, messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "one two three"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert len({c.id for c in chunks}) == 1
    assert {c.system_fingerprint for c in chunks} == {"base-fingerprint"}


def test_logprobs_come_with_each_endpoints_own_form(site: Site) -> None:
    completion = site.client().completions.create(
        model=BASE, prompt="Say", logprobs=2, max_tokens=3, echo=True
    )
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.text_offset is not None
    assert logprobs.token_logprobs[0] is None
    assert completion.choices[0].text.startswith("Say")
    length = completion.usage.prompt_tokens + 3  # type: ignore[union-attr]
    assert len(logprobs.tokens or []) == len(logprobs.token_logprobs) == length
    assert logprobs.text_offset == sorted(logprobs.text_offset)
    chat = site.client().chat.completions.create(
        model=BASE, messages=HELLO, logprobs=True, top_logprobs=2
    )
    content = chat.choices[0].logprobs.content  # type: ignore[union-attr]
    assert "".join(token.token for token in content or []) == "one two three"
    assert all(len(token.top_logprobs) == 2 for token in content or [])


def test_a_scored_prompt_waits_in_its_tenants_line(site: Site) -> None:
    site.client("acme").completions.create(
        model=BASE, prompt="1 2", max_tokens=0, echo=True, logprobs=1
    )
    assert site.engine.scored_for[-1] == "acme"


def test_a_prompt_alone_is_scored(site: Site) -> None:
    answer = site.client().completions.create(
        model=BASE, prompt=[5, 6, 7], max_tokens=0, echo=True, logprobs=1
    )
    assert answer.choices[0].finish_reason == "length"
    assert len(answer.choices[0].logprobs.token_logprobs or []) == 3  # type: ignore[union-attr]
    assert answer.usage.completion_tokens == 0  # type: ignore[union-attr]


@pytest.mark.parametrize("text", ["one two three", ""], ids=["a word", "the end"])
def test_lm_evals_scoring_gets_a_token_more_than_each_prompt_has(text: str) -> None:
    # what local-completions posts, and how it reads the reply; the token it cuts off may be the end
    prompts = [[5, 6, 7], [8, 9]]
    with served(text=text) as site:
        reply = site.post(
            {
                "model": BASE,
                "prompt": prompts,
                "temperature": 0,
                "max_tokens": 1,
                "logprobs": 1,
                "seed": 1234,
                "echo": True,
            }
        ).json()
    for ids, choice in zip(prompts, reply["choices"], strict=True):
        told = choice["logprobs"]
        assert len(told["token_logprobs"]) == len(ids) + 1
        assert told["token_logprobs"][1:-1] == [-1.0] * (len(ids) - 1)
        assert all(max(top.values()) == -1.0 for top in told["top_logprobs"][1:-1])


def test_lm_evals_generation_is_taken(site: Site) -> None:
    stops = ["\nclass", "\ndef", "\n#", "\nif", "\nprint", "<|end|>"]
    asked = {"model": BASE, "temperature": 0, "seed": 1234, "stop": stops, "max_tokens": 4}
    assert site.post({**asked, "prompt": [[5, 6], [7]]}).status_code == 200
    turns = [{"role": "user", "content": "Hello", "type": "text"}]
    chat = {**asked, "messages": turns}
    assert site.post(chat, "/v1/chat/completions").status_code == 200


def test_n_answers_of_a_seed_have_seeds_of_their_own(site: Site) -> None:
    answer = site.client().completions.create(
        model=BASE, prompt=["a", "b"], n=2, seed=7, max_tokens=2
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    seeds = [request.params.seed for request in site.engine.requests[-4:]]
    assert seeds == [7, 8, 7, 8]


def test_a_stop_text_ends_the_answer_and_the_generation(site: Site) -> None:
    before = site.engine.num_closed_early
    answer = site.client().completions.create(model=BASE, prompt="Say", stop=["two"], max_tokens=50)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("one ", "stop")
    assert site.engine.num_closed_early == before + 1


def test_json_formats_become_the_engines_schema(site: Site) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    for response_format, expected in (
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}, schema),
        ({"type": "text"}, None),
    ):
        site.client().chat.completions.create(
            model=BASE, messages=HELLO, response_format=response_format
        )
        assert site.engine.requests[-1].params.json_schema == expected


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (b"{", 400, None),
        (b"", 400, None),
        (b"\xff\xfe", 400, None),
        (b'{"model": "\xc3\x28"}', 400, None),
        (b"[]", 400, None),
        (b"null", 400, None),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, 400, None),
        (b'{"model": 1e400, "prompt": "x"}', 400, "model"),
        ({}, 400, "model"),
        ({"model": BASE}, 400, "prompt"),
        ({**GOOD, "model": 3}, 400, "model"),
        ({**GOOD, "model": ""}, 400, "model"),
        ({**GOOD, "model": "x" * 2000}, 400, "model"),
        ({**GOOD, "model": "nobody.knows"}, 404, "model"),
        ({**GOOD, "model": "../../etc/passwd"}, 404, "model"),
        ({**GOOD, "model": "models:/acme.bot@champion"}, 404, "model"),
        ({**GOOD, "model": "acme.bot:99"}, 404, "model"),
        ({**GOOD, "model": "acme.bot@other"}, 404, "model"),
        ({**GOOD, "prompt": []}, 400, "prompt"),
        ({**GOOD, "prompt": ""}, 200, None),
        (b'{"model": "s2ft://tiny", "prompt": "a\\ud800"}', 400, None),
        (b'{"model": "s2ft://tiny", "prompt": ["a", "\\udc00"]}', 400, None),
        (b'{"model": "\\ud800", "prompt": "a"}', 400, None),
        (b'{"model": "s2ft://tiny", "prompt": "a", "\\ud800": 1}', 400, None),
        (b'{"model": "s2ft://tiny", "prompt": "\\ud83d\\ude00", "max_tokens": 1}', 200, None),
        ({**GOOD, "prompt": [-1]}, 400, "prompt"),
        ({**GOOD, "prompt": [10**6]}, 400, "prompt"),
        ({**GOOD, "prompt": ["a", 1]}, 400, "prompt"),
        ({**GOOD, "prompt": "x " * 10**6}, 400, "prompt"),
        ({**GOOD, "prompt": "1 " * 600}, 400, "prompt"),
        ({**GOOD, "prompt": ["a"] * 65}, 400, "prompt"),
        ({**GOOD, "max_tokens": -1}, 400, "max_tokens"),
        ({**GOOD, "max_tokens": 0}, 400, None),
        ({**GOOD, "max_tokens": 10**9}, 400, "max_tokens"),
        ({**GOOD, "max_tokens": "2"}, 400, "max_tokens"),
        ({**GOOD, "max_tokens": True}, 400, "max_tokens"),
        ({**GOOD, "max_tokens": 256, "prompt": "1 " * 200}, 400, "max_tokens"),
        ({**GOOD, "temperature": -0.1}, 400, "temperature"),
        ({**GOOD, "temperature": 99}, 400, "temperature"),
        ({**GOOD, "top_p": 0}, 400, "top_p"),
        ({**GOOD, "top_k": -1}, 400, "top_k"),
        ({**GOOD, "n": 0}, 400, "n"),
        ({**GOOD, "n": 1000}, 400, "n"),
        ({**GOOD, "seed": 10**30}, 400, "seed"),
        ({**GOOD, "logprobs": 1000}, 400, "logprobs"),
        ({**GOOD, "presence_penalty": 3}, 400, "presence_penalty"),
        ({**GOOD, "stop": ["a"] * 17}, 400, "stop"),
        ({**GOOD, "stop": ""}, 400, "stop"),
        ({**GOOD, "logit_bias": {"5": 1}}, 400, None),
        ({**GOOD, "best_of": 3}, 400, None),
        ({**GOOD, "suffix": "x"}, 400, None),
        ({**GOOD, "stream_options": {"include_usage": True}}, 400, None),
        ({**GOOD, "temprature": 1}, 400, "temprature"),
        ({**CHAT, "messages": []}, 400, "messages"),
        ({**CHAT, "messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role"),
        ({**CHAT, "messages": [{"role": "user"}]}, 400, "messages.0.content"),
        ({**CHAT, "tools": [{"type": "function"}]}, 400, None),
        ({**CHAT, "top_logprobs": 3}, 400, None),
        ({**CHAT, "response_format": {"type": "yaml"}}, 400, "response_format"),
    ],
)
def test_bad_input_is_refused_with_openais_error(
    site: Site, body: Any, status: int, param: str | None
) -> None:
    is_chat = isinstance(body, dict) and "messages" in body
    reply = site.post(
        body,
        "/v1/chat/completions" if is_chat else "/v1/completions",
        **{"Content-Type": "application/json"},
    )
    assert reply.status_code == status, reply.text[:500]
    assert reply.headers["x-request-id"]
    if status == 200:
        return
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    assert len(error["message"]) < 1000
    if status == 404:
        assert error["code"] == "model_not_found"


def test_a_body_beyond_the_limit_is_refused_before_it_is_read(site: Site) -> None:
    reply = site.post(b"x" * (MAX_BODY_BYTES + 1), **{"Content-Type": "application/json"})
    assert reply.status_code == 413
    assert reply.json()["error"]["message"].startswith("The body is above")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405), ("DELETE", "/v1/models", 405)],
)
def test_unknown_paths_have_openais_error_too(
    site: Site, method: str, path: str, status: int
) -> None:
    reply = site.http.request(method, path, headers={"Authorization": "Bearer key-acme"})
    assert reply.status_code == status
    assert reply.json()["error"]["message"]
    assert reply.headers["x-request-id"]


def test_a_request_id_of_the_clients_own_comes_back(site: Site) -> None:
    assert site.post(GOOD, **{"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    evil = site.post(GOOD, **{"x-request-id": "a b"}).headers["x-request-id"]
    assert evil != "a b"


def test_the_engine_never_sees_a_clients_own_id(site: Site) -> None:
    before = len(site.engine.requests)
    for _ in range(2):
        site.post(GOOD, **{"x-request-id": "mine-1"})
    ids = [request.request_id for request in site.engine.requests[before:]]
    assert len(set(ids)) == 2
    assert not any("mine-1" in request_id for request_id in ids)


def test_a_template_that_fails_on_the_messages_is_a_400() -> None:
    route = replace(adapter_route("acme.bot"), chat_template="{{ 1 + messages[0]['content'] }}")
    with (
        served(make_catalog(CatalogModel("acme.bot", live={"champion": route}))) as site,
        pytest.raises(openai.BadRequestError, match="chat template refuses them"),
    ):
        site.client("acme").chat.completions.create(model="acme.bot", messages=HELLO)  # type: ignore[arg-type]


def test_a_tenant_sees_its_own_and_what_is_shared(site: Site) -> None:
    shared = CatalogModel("globex.open", frozenset({"acme"}), {"champion": adapter_route("x.y")})
    with served(make_catalog(ACME, GLOBEX, shared)) as site:
        listed = [model.id for model in site.client("acme").models.list()]
        assert listed == [BASE, "acme.bot", "globex.open"]
        assert [m.id for m in site.client().models.list()][-2:] == ["globex.bot", "globex.open"]
        site.client("acme").completions.create(model="globex.open", prompt="x")
        for name in ("globex.bot", "globex.bot:1", "globex.bot@champion", "globex.nothing"):
            with pytest.raises(openai.NotFoundError) as refused:
                site.client("acme").completions.create(model=name, prompt="x")
            assert refused.value.code == "model_not_found"
        assert site.client("acme").models.retrieve("acme.bot").owned_by == "acme"
        with pytest.raises(openai.NotFoundError):
            site.client("acme").models.retrieve("globex.bot")


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Basic abc", "Bearer wrong"])
def test_without_a_valid_key_nothing_is_answered(site: Site, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions"), ("GET", "/metrics")):
        reply = site.http.request(method, path, headers=headers)
        assert reply.status_code == 401
        assert reply.json()["error"]["type"] == "authentication_error"
    assert site.http.get("/healthz").status_code == 200


def test_operators_only(site: Site) -> None:
    for path in ("/metrics", "/v1/adapters"):
        reply = site.http.get(path, headers={"Authorization": "Bearer key-acme"})
        assert reply.status_code == 403
    reply = site.http.get("/v1/adapters", headers={"Authorization": "Bearer key-operator"})
    held, elsewhere = reply.json()["data"]
    assert held == {"base": BASE, "name": "acme.bot", "version": 1}
    assert (elsewhere["name"], elsewhere["version"]) == ("globex.bot", 1)
    assert (elsewhere["tier"], elsewhere["replica"], elsewhere["bytes"]) == ("registry", None, None)


def test_keys_are_in_no_log(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        site.post(GOOD, Authorization="Bearer key-acme")
        site.post(GOOD, Authorization="Bearer wrong-key")
    assert "seconds=" in caplog.text
    assert "key-acme" not in caplog.text
    assert "wrong-key" not in caplog.text


def test_an_owner_moves_its_aliases_and_nobody_elses(site: Site) -> None:
    path = "/v1/models/acme.bot/promote"
    own = site.post({"version": 2}, path, Authorization="Bearer key-acme")
    assert own.json() == {"model": "acme.bot", "alias": "champion", "version": 2, "before": 1}
    other = site.post({"version": 2}, path, Authorization="Bearer key-globex")
    assert other.status_code == 404
    assert site.watcher.moves == [("acme.bot", 2, "champion")]
    back = site.post({}, "/v1/models/acme.bot/rollback")
    assert back.status_code == 400
    assert "no other version" in back.json()["error"]["message"]


def test_the_operator_places_adapters_and_nobody_else(site: Site) -> None:
    path = "/v1/models/acme.bot/place"
    placed = site.post({"placement": "pinned", "alias": "candidate"}, path)
    assert placed.json() == {"model": "acme.bot", "alias": "candidate", "placement": "pinned"}
    assert site.watcher.moves[-1] == ("acme.bot", "candidate", "pinned")
    assert site.post({"placement": None}, path, Authorization="Bearer key-acme").status_code == 403
    assert site.post({"placement": "hot"}, path).status_code == 400
    assert site.post({"placement": "warm"}, "/v1/models/nobody.bot/place").status_code == 400


def test_the_description_is_whole(site: Site) -> None:
    description = site.http.get("/openapi.json").json()
    assert {"/v1/models", "/v1/completions", "/v1/chat/completions"} <= set(description["paths"])
    for path in description["paths"].values():
        for operation in path.values():
            assert "4XX" in operation["responses"]


def test_closing_the_generation_early_ends_it() -> None:
    async def leave() -> int:
        engine = Parrot()
        engine.pause_s = 0.01
        base = FakeBase(engine)
        from s2ft_ray.serving.bodies import Identity
        from s2ft_ray.serving.routes import Route, ServedRequest
        from s2ft_ray.serving.schemas import CompletionRequest

        request = CompletionRequest(model=BASE, prompt="x", stream=True, n=3)
        identity = Identity("id", 0, BASE, "f")
        stream = base.answer(ServedRequest(request, Route(BASE, "f"), identity, "r", "acme"))
        await anext(stream)
        await stream.aclose()
        await base.generator.answer(
            ServedRequest(request, Route(BASE, "f"), identity, "r", "acme")
        ).aclose()
        await asyncio.sleep(0.05)
        return engine.num_closed_early

    assert asyncio.run(leave()) == 3
