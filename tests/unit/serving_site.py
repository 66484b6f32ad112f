"""The served API over a parrot: what its tests ask."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
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
from starlette.testclient import TestClient

from s2ft_ray.serving.access import Access
from s2ft_ray.serving.api import build_api
from s2ft_ray.serving.catalog import Catalog, CatalogModel
from s2ft_ray.serving.service import Service
from s2ft_ray.serving.settings import ServingSettings

ACME = CatalogModel("acme.bot", live={"champion": adapter_route("acme.bot")})
GLOBEX = CatalogModel("globex.bot", live={"champion": adapter_route("globex.bot")})
HELLO = [{"role": "user", "content": "Hello"}]
GOOD: dict[str, Any] = {"model": BASE, "prompt": "Say", "max_tokens": 2}
CHAT: dict[str, Any] = {"model": BASE, "messages": HELLO}


class Site:
    """A served API, and clients of it."""

    def __init__(
        self,
        http: TestClient,
        engine: Parrot,
        watcher: FakeWatcher,
        base: FakeBase,
        ledger: Ledger,
    ) -> None:
        self.http = http
        self.ledger = ledger
        self.engine = engine
        self.base = base
        self.watcher = watcher

    def client(self, owner: str = "operator", retries: int = 0) -> openai.OpenAI:
        return openai.OpenAI(
            base_url="http://testserver/v1",
            api_key=f"key-{owner}",
            max_retries=retries,
            http_client=self.http,
        )

    def post(self, body: Any, path: str = "/v1/completions", **headers: str) -> Any:
        sent = {"content": body} if isinstance(body, bytes) else {"json": body}
        headers = {"Authorization": "Bearer key-operator", **headers}
        return self.http.post(path, headers=headers, **sent)


@contextmanager
def served(
    catalog: Catalog | None = None,
    text: str = "one two three",
    accounts: FakeAccounts | None = None,
    deaths: int = 0,
    dies_after: int = 0,
    **settings: Any,
) -> Iterator[Site]:
    engine, watcher = Parrot(text), FakeWatcher(catalog or make_catalog(ACME, GLOBEX))
    base = FakeBase(engine, deaths, dies_after)
    ledger = Ledger()
    service = Service(ServingSettings(**settings), {BASE: base}, watcher, ledger)
    known = None if settings.get("no_auth") else accounts or FakeAccounts()
    api = build_api(service, Access(known))  # type: ignore[arg-type]
    with TestClient(api, raise_server_exceptions=False) as http:
        site = Site(http, engine, watcher, base, ledger)
        while (
            watcher.current.is_ready
            and site.http.get(
                "/v1/models", headers={"Authorization": "Bearer key-operator"}
            ).status_code
            != 200
        ):
            pass  # the service takes its first catalog a moment after the start
        yield site
