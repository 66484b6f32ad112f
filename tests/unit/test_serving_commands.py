"""`s2ft serve | chat | adapters list` against a service of plain replies."""

import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from s2ft_ray.cli import main

ADAPTER = {
    "base": "s2ft://tiny",
    "replica": "k3x9a0zq",
    "name": "acme.bot",
    "version": 2,
    "tier": "device",
    "bytes": 185120,
    "running": 0,
    "last_used": 1795490658.0,
    "requests_per_minute": 3,
    "placement": "pinned",
}


class Handler(BaseHTTPRequestHandler):
    seen: ClassVar[list[tuple[str, str | None, Any]]] = []
    status = 200

    def do_GET(self) -> None:
        self._reply(None, {"object": "list", "data": [ADAPTER]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = {"role": "assistant", "content": "TICKET 1"}
        self._reply(body, {"choices": [{"message": answer}]})

    def _reply(self, body: Any, document: Any) -> None:
        self.seen.append((self.path, self.headers["Authorization"], body))
        if self.status != 200:
            document = {"error": {"message": "no such key"}}
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(json.dumps(document).encode())

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Handler, "seen", [])
    monkeypatch.setenv("S2FT_API_KEY", "s2ft-key")
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_adapters_are_listed_as_a_table_and_as_json(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapters", "list", "--url", url]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["ADAPTER", "VERSION", "BASE"]
    assert row.split()[:6] == ["acme.bot", "2", "s2ft://tiny", "k3x9a0zq", "device", "185,120"]
    assert "2026-11-24 03:24:18+00:00" in row
    assert row.split()[-1] == "pinned"
    assert main(["adapters", "list", "--json", "--url", url]) == 0
    assert json.loads(capsys.readouterr().out) == [ADAPTER]
    assert Handler.seen[0][:2] == ("/v1/adapters", "Bearer s2ft-key")


def test_a_chat_keeps_its_turns(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("first\nsecond\n"))
    assert main(["chat", "acme.bot", "--url", url]) == 0
    assert capsys.readouterr().out.splitlines() == ["TICKET 1", "TICKET 1"]
    roles = [turn["role"] for turn in Handler.seen[1][2]["messages"]]
    assert roles == ["user", "assistant", "user"]


@pytest.mark.parametrize(("status", "code"), [(401, 2), (404, 2), (503, 1)])
def test_a_refusal_is_one_line(
    url: str,
    status: int,
    code: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Handler, "status", status)
    assert main(["adapters", "list", "--url", url]) == code
    assert capsys.readouterr().err == f"error: {url}: no such key\n"


def test_without_a_service_or_a_node_the_way_out_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["adapters", "list", "--url", "http://127.0.0.1:9"]) == 1
    assert "s2ft serve starts the service" in capsys.readouterr().err
    monkeypatch.setenv("S2FT_HOME", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert main(["serve", "--base", "s2ft://tiny"]) == 1
    assert (
        capsys.readouterr().err
        == f"error: nothing is up in {tmp_path}; s2ft up starts it, RAY_ADDRESS names a cluster\n"
    )
    with pytest.raises(SystemExit, match="2"):
        main(["serve", "--base", "s2ft://tiny", "--port", "80"])
