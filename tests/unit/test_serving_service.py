"""What the service answers when the registry, a base or the time is short, and its limits."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import openai
import pytest
from serving_fakes import (
    BASE,
    FakeAccounts,
    FakeBase,
    FakeWatcher,
    Ledger,
    Parrot,
    adapter_route,
    make_catalog,
)
from serving_site import ACME, GLOBEX, GOOD, Site, served

from s2ft_ray.accounts import Principal, Tenant
from s2ft_ray.registry import ModelRef
from s2ft_ray.serving import service as service_module
from s2ft_ray.serving.access import Access
from s2ft_ray.serving.catalog import Catalog, CatalogModel
from s2ft_ray.serving.routes import ServedRequest
from s2ft_ray.serving.schemas import CompletionRequest
from s2ft_ray.serving.service import Caller, Service
from s2ft_ray.serving.settings import ServingSettings
from s2ft_ray.serving.wire_errors import ApiError


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with served() as site:
        yield site


def test_models_wait_for_the_first_pass_over_the_registry() -> None:
    with served(make_catalog(is_ready=False, problem="MLflow is away")) as site:
        for _ in range(100):
            reply = site.http.get("/v1/models", headers={"Authorization": "Bearer key-operator"})
            assert reply.status_code == 503
            if "MLflow is away" in reply.text:
                break
        assert "MLflow is away" in reply.json()["error"]["message"]
        assert reply.headers["retry-after"]
        assert site.post({**GOOD, "model": "acme.bot"}).status_code == 503


def test_a_restarted_watcher_takes_nothing_away_before_it_has_looked() -> None:
    with served(make_catalog(ACME)) as site:
        site.watcher.current = Catalog(("w2", 0))
        site.watcher.current = Catalog(("w2", 1), problem="MLflow is away")
        unknown = {**GOOD, "model": "acme.new"}
        while site.post(unknown).status_code != 503:
            pass  # the service hears of it a moment later
        site.client("acme").completions.create(model="acme.bot", prompt="x")
        site.watcher.current = replace(make_catalog(ACME), revision=("w2", 2))
        while site.post(unknown).status_code != 404:
            pass


def test_a_watcher_restarted_while_a_base_is_away_takes_nothing_away_either() -> None:
    with served(make_catalog(ACME, GLOBEX)) as site:
        waiting = {"champion": "version 1: its base hasn't come up yet"}
        site.watcher.current = make_catalog(
            CatalogModel("acme.bot", waiting=waiting),
            CatalogModel("globex.bot", live={"champion": adapter_route("globex.bot", 2)}),
            CatalogModel("acme.new", waiting=waiting),
            revision=("w2", 1),
            bases={},
        )
        client = site.client()
        while client.completions.create(model="globex.bot", prompt="x").system_fingerprint != (
            "globex.bot-2"
        ):
            pass  # the service takes the catalog a moment later
        answer = client.completions.create(model="acme.bot", prompt="x")
        assert answer.system_fingerprint == "acme.bot-1"
        assert client.completions.create(model=BASE, prompt="x").choices
        assert site.post({**GOOD, "model": "acme.new"}).status_code == 503


def test_without_the_registry_what_is_known_is_served_and_the_rest_is_503() -> None:
    with served(make_catalog(ACME, problem="MLflow is away")) as site:
        site.client("acme").completions.create(model="acme.bot", prompt="x")
        unknown = site.post({**GOOD, "model": "acme.new"}, Authorization="Bearer key-acme")
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (
            503,
            "registry_unavailable",
        )
        others = site.post({**GOOD, "model": "globex.new"}, Authorization="Bearer key-acme")
        assert others.status_code == 404


def test_a_version_is_answered_by_itself(site: Site) -> None:
    site.watcher.versions[ModelRef("acme.bot", version=7)] = adapter_route("acme.bot", 7)
    answer = site.client().completions.create(model="acme.bot:7", prompt="x")
    assert (answer.system_fingerprint, answer.model) == ("acme.bot-7", "acme.bot:7")


def test_a_rejected_version_is_told_to_who_may_see_the_model() -> None:
    rejected = CatalogModel("acme.bad", rejected={"champion": "version 3: canary: off by 2"})
    with served(make_catalog(rejected)) as site:
        with pytest.raises(openai.NotFoundError, match="canary: off by 2"):
            site.client("acme").completions.create(model="acme.bad", prompt="x")
        with pytest.raises(openai.NotFoundError) as hidden:
            site.client("globex").completions.create(model="acme.bad", prompt="x")
        assert "canary" not in hidden.value.message


def test_too_many_requests_in_a_minute_are_told_when_to_come_back() -> None:
    with served(accounts=FakeAccounts(requests_per_minute=2)) as site:
        client = site.client("acme")
        for _ in range(2):
            client.completions.create(model=BASE, prompt="x")
        with pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(model=BASE, prompt="x")
        assert 50 <= int(refused.value.response.headers["retry-after"]) <= 61
        site.client("globex").completions.create(model=BASE, prompt="x")


def test_a_request_whose_replica_died_is_sent_again() -> None:
    with served(deaths=2) as site:
        answer = site.client().completions.create(model="acme.bot", prompt="x")
        assert answer.choices[0].text == "one two three"
    with served(deaths=1) as site:
        stream = site.client().completions.create(model=BASE, prompt="x", stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == "one two three"


def test_a_stream_whose_replica_dies_ends_with_an_error() -> None:
    with served(deaths=1, dies_after=2) as site:
        stream = site.client().completions.create(model=BASE, prompt="x", stream=True)
        pieces: list[str] = []
        with pytest.raises(openai.APIError, match="died in the middle"):
            pieces.extend(chunk.choices[0].text for chunk in stream)
        assert pieces
        assert "one two three".startswith("".join(pieces))


def test_an_answer_that_takes_too_long_is_given_up() -> None:
    with served(request_timeout_s=0.2) as site:
        site.engine.pause_s = 0.15
        with pytest.raises(openai.InternalServerError, match="wasn't whole") as refused:
            site.client(retries=2).completions.create(**GOOD)
        assert refused.value.status_code == 504
        assert len(site.engine.requests) == site.engine.num_closed_early == 1
        body = site.post({**GOOD, "stream": True}).text
        *_, last = [line for line in body.split("\n\n") if line]
        assert "wasn't whole" in json.loads(last.removeprefix("data: "))["error"]["message"]


def test_looking_a_version_up_is_given_up_in_time_too() -> None:
    with served(request_timeout_s=0.1) as site:
        site.watcher.find_s = 5.0
        started = time.monotonic()
        assert site.post({**GOOD, "model": "acme.bot:7"}).status_code == 504
        assert time.monotonic() - started < 2


def test_more_requests_at_once_than_a_tenant_may_have_are_refused() -> None:
    with (
        served(accounts=FakeAccounts(max_concurrent_requests=2)) as site,
        ThreadPoolExecutor() as pool,
    ):
        site.engine.pause_s = 0.2
        acme = {"Authorization": "Bearer key-acme"}
        replies = list(pool.map(lambda _: site.post(GOOD, **acme), range(3)))
        assert sorted(reply.status_code for reply in replies) == [200, 200, 429]
        (refused,) = [reply for reply in replies if reply.status_code == 429]
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert refused.headers["retry-after"] == "1"
        assert site.post(GOOD, **acme).status_code == 200


def test_health_tells_of_a_base_that_no_longer_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "_SILENCE_S", 0.2)
    monkeypatch.setattr(service_module, "_PROBE_S", 0.02)
    with served() as site:
        assert site.http.get("/healthz").status_code == 200
        site.base.is_stuck = True
        while (sick := site.http.get("/healthz")).status_code == 200:
            pass  # it was heard a moment ago
        assert sick.status_code == 503
        assert BASE in sick.text
        site.base.is_stuck = False
        while site.http.get("/healthz").status_code != 200:
            pass


def test_without_accounts_everybody_is_an_operator() -> None:
    with served(accounts=None, no_auth=True) as site:
        reply = site.http.get("/v1/models")
        assert {model["id"] for model in reply.json()["data"]} == {BASE, "acme.bot", "globex.bot"}
        assert site.http.get("/v1/adapters").status_code == 200


def test_a_revoked_key_is_refused_two_seconds_later_at_the_latest() -> None:
    now, accounts = [0.0], FakeAccounts()
    access = Access(accounts, clock=lambda: now[0])  # type: ignore[arg-type]
    ask = "Bearer key-acme"
    assert asyncio.run(access.identify(ask))[0].tenant == "acme"
    accounts.revoked.add("key-acme")
    now[0] = 1.9
    assert asyncio.run(access.identify(ask))[0].tenant == "acme"
    now[0] = 2.1
    with pytest.raises(ApiError, match="revoked"):
        asyncio.run(access.identify(ask))


def test_an_error_inside_is_a_500_without_its_text() -> None:
    with served() as site:
        site.engine.ids = [None]
        reply = site.post(GOOD)
        assert reply.status_code == 500
        assert reply.headers["x-request-id"] in reply.json()["error"]["message"]
        assert "None" not in reply.text


def test_an_error_of_the_service_itself_counts_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(_: ServedRequest) -> AsyncGenerator[str]:
        raise RuntimeError("a fault")
        yield ""

    with served() as site:
        monkeypatch.setattr(site.base, "answer", fail)
        assert site.post(GOOD).status_code == 500
        assert site.ledger.ends == [("operator", BASE, "", 500)]


def test_a_client_that_leaves_counts_as_one() -> None:
    async def leave() -> list[tuple[str, str, str, int]]:
        ledger, base = Ledger(), FakeBase(Parrot())
        watcher = FakeWatcher(make_catalog())
        service = Service(ServingSettings(), {BASE: base}, watcher, ledger)
        await service.start()
        caller = Caller(Principal("k0", None, True), Tenant(name="operator"), "r")
        texts = await service.stream(CompletionRequest(**GOOD, stream=True), caller)
        await texts.aclose()  # type: ignore[attr-defined]
        await service.stop()
        return ledger.ends

    assert asyncio.run(leave()) == [("operator", BASE, "", 499)]


def test_what_is_refused_counts_under_a_model_that_the_caller_may_see() -> None:
    with served(accounts=FakeAccounts(requests_per_minute=1)) as site:
        acme = {"Authorization": "Bearer key-acme"}
        assert site.post(GOOD, **acme).status_code == 200
        for model in ("acme.bot", "acme.bot:7", "globex.bot", "made-up", BASE):
            assert site.post({**GOOD, "model": model}, **acme).status_code == 429
        counted = [(model, version) for _, model, version, _ in site.ledger.ends[1:]]
        assert counted == [("acme.bot", "1"), ("acme.bot", ""), ("", ""), ("", ""), (BASE, "")]
