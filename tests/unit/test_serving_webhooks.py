"""MLflow's webhooks, signed and sent by MLflow's own code."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities.webhook import Webhook, WebhookAction, WebhookEntity, WebhookEvent
from mlflow.webhooks.delivery import _send_webhook_request
from serving_fakes import BASE, FakeAccounts, FakeBase, FakeWatcher, Parrot, Silent, make_catalog
from starlette.testclient import TestClient

from s2ft_ray.errors import ConfigError
from s2ft_ray.serving.access import Access
from s2ft_ray.serving.api import build_api
from s2ft_ray.serving.boundary import WEBHOOK_PATH
from s2ft_ray.serving.service import Service
from s2ft_ray.serving.settings import ServingSettings
from s2ft_ray.serving.webhooks import WebhookSecret
from s2ft_ray.serving.wire_errors import ApiError

SECRET = "0123456789abcdef0123456789abcdef"
MOVED = WebhookEvent(WebhookEntity.MODEL_VERSION_ALIAS, WebhookAction.CREATED)


class Site:
    """A service that takes webhooks, and MLflow's way to send them."""

    def __init__(self, secret: WebhookSecret | None) -> None:
        self.watcher = FakeWatcher(make_catalog())
        service = Service(ServingSettings(), {BASE: FakeBase(Parrot())}, self.watcher, Silent())
        self.http = TestClient(build_api(service, Access(FakeAccounts()), secret))  # type: ignore[arg-type]
        self.sent: dict[str, Any] = {}

    def post(self, url: str, data: bytes, headers: dict[str, str], timeout: float) -> Any:
        """What MLflow asks of a session."""
        self.sent = {"headers": headers, "content": data}
        assert timeout > 0
        return self.http.post(url, content=data, headers=headers)

    def deliver(self, secret: str | None) -> Any:
        url = f"https://127.0.0.1{WEBHOOK_PATH}"
        webhook = Webhook("1", "s2ft", url, [MOVED], 0, 0, secret=secret)
        payload: Any = {"name": "acme.bot", "alias": "champion", "version": "2"}
        return _send_webhook_request(webhook, payload, MOVED, self)  # type: ignore[arg-type]


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS", "true")
    site = Site(WebhookSecret(SECRET.encode()))
    with site.http:
        yield site


def test_what_mlflow_signs_makes_the_watcher_look(site: Site) -> None:
    reply = site.deliver(SECRET)
    assert (reply.status_code, reply.json()) == (200, {"status": "ok"})
    assert site.watcher.num_wakes == 1


@pytest.mark.parametrize("secret", [None, "another-secret-of-some-length"])
def test_without_the_secret_nothing_happens(site: Site, secret: str | None) -> None:
    reply = site.deliver(secret)
    assert reply.status_code == 401
    assert reply.json()["error"]["type"] == "authentication_error"
    assert site.watcher.num_wakes == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda sent: sent["headers"].update({"X-MLflow-Timestamp": str(int(time.time()) - 1)}),
        lambda sent: sent["headers"].update({"X-MLflow-Delivery-Id": "another"}),
        lambda sent: sent.update(content=json.dumps({"data": {}}).encode()),
    ],
    ids=["time", "id", "body"],
)
def test_nothing_of_a_delivery_can_be_changed(site: Site, change: Any) -> None:
    site.deliver(SECRET)
    change(site.sent)
    assert site.http.post(WEBHOOK_PATH, **site.sent).status_code == 401


def test_an_old_delivery_is_refused(site: Site) -> None:
    site.deliver(SECRET)
    headers = {name.lower(): value for name, value in site.sent["headers"].items()}
    later = WebhookSecret(SECRET.encode(), lambda: time.time() + 400)
    with pytest.raises(ApiError, match="more than 300 s ago"):
        later.check(headers, site.sent["content"])


def test_a_service_without_a_secret_takes_no_webhooks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS", "true")
    site = Site(None)
    with site.http:
        assert site.deliver(SECRET).status_code == 404


def test_the_secret_comes_from_a_file_and_is_no_word(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    with pytest.raises(ConfigError, match="can't be read"):
        WebhookSecret.read(str(path))
    path.write_text("short\n")
    with pytest.raises(ConfigError, match="openssl rand -hex 32"):
        WebhookSecret.read(str(path))
