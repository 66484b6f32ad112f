"""A data set by its name on a hub, here one on loopback that answers as huggingface.co does."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_parts import instruction_row

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROWS = [instruction_row(number) for number in range(20)]
HELD = ROWS[:3]

# huggingface_hub reads where the hub is as it is imported. One process for all: it takes seconds.
READ = """
import json, sys
from s2ft_ray.data.location import open_source
from s2ft_ray.errors import DataError
for name, key in json.loads(sys.argv[1]):
    try:
        source = open_source(name, key)
        rows = [[row.line, row.where, row.fields] for row in source.records()]
        print(json.dumps({"sha256": source.sha256, "rows": rows}))
    except DataError as error:
        print(json.dumps({"faults": error.faults}))
"""
ASKED = [
    ("acme/lines", "data.train"),
    ("acme/lines", "data.eval"),
    ("acme/lines:validation", "data.train"),
    ("acme/tables", "data.train"),
    ("acme/tables:test", "data.eval"),
    ("acme/tables", "data.eval"),
    ("acme/nothing", "data.train"),
    ("acme/private", "data.train"),
    ("acme/gated", "data.train"),
    ("acme/empty", "data.train"),
    ("acme/damaged", "data.train"),
]


def write_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


REPOSITORIES = {
    "acme/lines": {
        "README.md": b"# Rows\n",
        "data/train.jsonl": write_jsonl(ROWS),
        "data/validation.jsonl": write_jsonl(HELD),
    },
    "acme/tables": {
        "data/train-00000-of-00002.parquet": write_parquet(ROWS[:12]),
        "data/train-00001-of-00002.parquet": write_parquet(ROWS[12:]),
        "data/test-00000-of-00001.parquet": write_parquet(HELD),
    },
    "acme/empty": {"README.md": b"# Nothing yet\n"},
    "acme/damaged": {"train.jsonl": write_jsonl(ROWS[:2]) + b'{"instruction": \n'},
}
REFUSED = {"acme/private": (401, "RepoNotFound"), "acme/gated": (401, "GatedRepo")}


class Hub(ThreadingHTTPServer):
    """The data-set routes of a hub, whose repositories have one commit each."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        self._answer(b"")

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers["Content-Length"])))

    def _answer(self, body: bytes) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        api = path.startswith("/api/")
        name, _, rest = path.removeprefix("/api").removeprefix("/datasets/").partition("/")
        inner, _, rest = rest.partition("/")
        name = f"{name}/{inner}"
        if name in REFUSED:
            status, code = REFUSED[name]
            self._send(status, b"", {"X-Error-Code": code})
        elif name not in REPOSITORIES:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif api:
            self._tell(REPOSITORIES[name], name, rest, body)
        else:
            _, revision, file = rest.split("/", 2)
            assert revision in ("main", COMMIT), path
            self._give(REPOSITORIES[name].get(file))

    def _give(self, content: bytes | None) -> None:
        headers = {"X-Repo-Commit": COMMIT}
        if content is None:
            self._send(404, b"", {**headers, "X-Error-Code": "EntryNotFound"})
            return
        digest = hashlib.sha256(content).hexdigest()
        self._send(200, content, {**headers, "ETag": f'"{digest}"'})

    def _tell(self, files: dict[str, bytes], name: str, rest: str, body: bytes) -> None:
        entries = [_entry(path, content) for path, content in files.items()]
        folders = {path.rpartition("/")[0] for path in files} - {""}
        entries += [{"type": "directory", "path": it, "oid": "0" * 40} for it in sorted(folders)]
        kind, _, revision = rest.partition("/")
        if kind in ("", "revision"):
            siblings = [{"rfilename": path} for path in files]
            self._send_json(
                {"id": name, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings}
            )
        elif kind == "tree":
            below = revision.partition("/")[2]
            everything = parse_qs(urlsplit(self.path).query).get("recursive") == ["True"]
            self._send_json([it for it in entries if _is_below(it["path"], below, everything)])
        elif kind == "paths-info":
            wanted = parse_qs(body.decode()).get("paths", [])
            self._send_json([it for it in entries if it["path"] in wanted])
        else:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})

    def _send_json(self, document: Any) -> None:
        self._send(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        first, last = 0, len(content) - 1
        asked = self.headers.get("Range", "")
        if status == 200 and asked.startswith("bytes=") and content:
            start, _, end = asked.removeprefix("bytes=").partition("-")
            first, last = int(start), min(int(end or last), last)
            headers = {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"}
            status = 206
        part = content[first : last + 1]
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(part))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(part)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def _entry(path: str, content: bytes) -> dict[str, Any]:
    return {
        "type": "file",
        "path": path,
        "size": len(content),
        "oid": hashlib.sha1(content).hexdigest(),
        # datasets asks for it, expanded
        "lastCommit": {"id": COMMIT, "title": "rows", "date": "2026-01-01T00:00:00.000Z"},
    }


def _is_below(path: str, folder: str, everything: bool) -> bool:
    rest = path.removeprefix(f"{folder}/") if folder else path
    return (not folder or path.startswith(f"{folder}/")) and (everything or "/" not in rest)


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def read(asked: list[tuple[str, str]], url: str, home: Path, **more: str) -> list[dict[str, Any]]:
    """Open names in a process that knows the hub at `url`; return what it tells of each."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", READ, json.dumps(asked)],
        env={**kept, "HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **more},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def answers(hub: Hub, home: Path) -> dict[tuple[str, str], dict[str, Any]]:
    return dict(zip(ASKED, read(ASKED, hub.url, home), strict=True))


@pytest.mark.parametrize(
    ("name", "key", "rows"),
    [
        ("acme/lines", "data.train", ROWS),
        ("acme/lines", "data.eval", HELD),
        ("acme/lines:validation", "data.train", HELD),
        ("acme/tables", "data.train", ROWS),
        ("acme/tables:test", "data.eval", HELD),
    ],
)
def test_a_name_on_the_hub_gives_its_rows(
    answers: dict[tuple[str, str], dict[str, Any]], name: str, key: str, rows: list[dict[str, Any]]
) -> None:
    digest = hashlib.sha256(b"".join(json.dumps(row).encode() for row in rows)).hexdigest()
    numbered = [[number, f"row {number}", row] for number, row in enumerate(rows, 1)]
    assert answers[name, key] == {"sha256": digest, "rows": numbered}


@pytest.mark.parametrize(
    ("name", "key", "told"),
    [
        ("acme/tables", "data.eval", "has no split validation; name one of acme/tables:train, "),
        ("acme/nothing", "data.train", "'acme/nothing' doesn't exist on the Hub or cannot be"),
        ("acme/private", "data.train", "'acme/private' doesn't exist on the Hub or cannot be"),
        ("acme/gated", "data.train", "is a gated dataset on the Hub. You must be authenticated"),
        ("acme/empty", "data.train", "doesn't contain any data files; name a file, a folder"),
        ("acme/damaged", "data.train", "JSON parse error: Invalid value. in row 2; name a file"),
    ],
)
def test_what_the_hub_refuses_or_lacks_is_one_clear_fault(
    answers: dict[tuple[str, str], dict[str, Any]], name: str, key: str, told: str
) -> None:
    (fault,) = answers[name, key]["faults"]
    assert fault.startswith(f"{key}: {name}: ")
    assert told in fault
    assert "\n" not in fault


def test_what_was_read_once_is_read_without_the_hub(
    answers: dict[tuple[str, str], dict[str, Any]], home: Path
) -> None:
    asked = [("acme/lines", "data.train"), ("acme/other", "data.train")]
    # Without HF_HUB_OFFLINE huggingface_hub tries again for half a minute first.
    found, other = read(asked, "http://127.0.0.1:9", home, HF_HUB_OFFLINE="1")
    assert found == answers["acme/lines", "data.train"]
    (fault,) = other["faults"]
    assert "Couldn't reach 'acme/other' on the Hub" in fault
