"""Files as numbered rows: what is told of a file or a line that can't be read."""

import codecs
import errno
import hashlib
import io
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from s2ft_ray.data.location import open_source
from s2ft_ray.data.source import Record, SourceFile
from s2ft_ray.errors import DataError


def read(path, content: bytes) -> list[Record]:
    path.write_bytes(content)
    return list(SourceFile(str(path), "data.train").records())


def test_lines_are_numbered_as_an_editor_numbers_them(tmp_path):
    records = read(tmp_path / "d.jsonl", b'{"a": 1}\n\n  \r\n{"a": 2}\r\n{"a": 3}')
    assert [(r.line, r.fields["a"]) for r in records] == [(1, 1), (4, 2), (5, 3)]


def test_a_line_separator_inside_a_string_ends_no_line(tmp_path):
    records = read(tmp_path / "d.jsonl", '{"a": "x\u2028y\x85z"}\n{"a": "b"}\n'.encode())
    assert [(r.line, r.fields["a"]) for r in records] == [(1, "x\u2028y\x85z"), (2, "b")]


def test_a_utf8_byte_order_mark_is_skipped(tmp_path):
    for content in (b'{"a": 1}\n', b'[{"a": 1}]'):
        (record,) = read(tmp_path / "d.json", codecs.BOM_UTF8 + content)
        assert (record.line, record.fields, record.fault) == (1, {"a": 1}, None)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b'{"a": 1 "b": 2}', "is no valid JSON at column 9: Expecting ',' delimiter; write one"),
        (b'{"a": 1', "is no valid JSON at column 8"),
        (b"[1, 2]", "is a JSON array, not an object; write one JSON object per line"),
        (b'"text"', "is a JSON string, not an object"),
        (b"null", "is a JSON null, not an object"),
        (b'{"a": "\xe9"}', "is no valid UTF-8 at byte 8 of the line (0xe9); save the file as"),
        (b'{"a": {"b": 1, "b": 2}}', "b: the key stands twice in one object; keep one of them"),
        (b'{"a": ' + b"[" * 100_000, "maximum recursion depth exceeded"),
        (b'{"a": ' + b"1" * 5000 + b"}", "Exceeds the limit"),
    ],
)
def test_a_line_that_cant_be_read_is_told_and_hides_no_other(tmp_path, line, told):
    good, bad, last = read(tmp_path / "d.jsonl", b'{"a": 0}\n' + line + b'\n{"a": 2}\n')
    assert (good.fault, last.fault, last.line, last.fields) == (None, None, 3, {"a": 2})
    assert bad.line == 2
    assert bad.fault is not None
    assert bad.fault.startswith(told)


def test_the_rows_of_an_array_keep_their_lines(tmp_path):
    content = b'[\n {"a": 1},\n\n {"a":\n 2}, {"a": 3}, 4,\n {"b": 1, "b": 1}, {"a": 5},\n'
    content += b'{"a": ' + b"1" * 5000 + b'}, {"a": 6}]\n'
    records = read(tmp_path / "d.json", content)
    assert [r.line for r in records] == [2, 4, 5, 5, 6, 6, 7, 7]
    assert [r.where for r in records][:3] == ["2 (row 1)", "4 (row 2)", "5 (row 3)"]
    assert [r.fields.get("a") for r in records] == [1, 2, 3, None, None, 5, None, 6]
    assert records[3].fault == (
        "is a JSON number, not an object;"
        " write one JSON object per line (JSONL), or one JSON array of objects"
    )
    assert records[4].fault == "b: the key stands twice in one object; keep one of them"
    assert records[6].fault is not None
    assert records[6].fault.startswith("Exceeds the limit")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'[{"a": 1},\n {"a" 2}]', "d.json:2: is no valid JSON at column 7: Expecting ':'"),
        (b'[{"a": 1}\n {"a": 2}]', "d.json:2: is no valid JSON at column 2: Expecting ','"),
        (b'[{"a": 1},\n', "d.json:2: is no valid JSON at column 1: Expecting value"),
        (b'[{"a": 1},\n]', "d.json:2: is no valid JSON at column 1: Expecting value"),
        (b'[{"a": 1}', "d.json:1: is no valid JSON at column 10: Expecting ','"),
        (b"[]\n[]", "d.json:2: is no valid JSON at column 1: Extra data"),
        (b'[\n{"a": "\xff"}]', "d.json:2: is no valid UTF-8 at byte 8 of the line (0xff)"),
        (b"[" * 100_000, "d.json:1: is no valid JSON at column 2: maximum recursion depth"),
        (b'{\n "a": 1\n}\n', "d.json:1: an object goes on over several lines; write one JSON"),
    ],
)
def test_what_hides_the_rest_of_a_file_is_an_error(tmp_path, content, told):
    with pytest.raises(DataError) as caught:
        read(tmp_path / "d.json", content)
    (fault,) = caught.value.faults
    assert fault.removeprefix(f"{tmp_path}/").startswith(told)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"[]", b" [ ] \n"])
def test_an_empty_file_has_no_rows(tmp_path, content):
    assert read(tmp_path / "d.json", content) == []


def test_a_file_in_utf16_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"d\.jsonl:1: is UTF-16; save the file as UTF-8"):
        read(tmp_path / "d.jsonl", '{"a": 1}\n'.encode("utf-16"))


def test_a_missing_file_is_named_with_its_key_and_where_it_was_sought(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        SourceFile("no.jsonl", "data.eval")
    assert str(caught.value) == (
        f"data.eval: no.jsonl: no such file (looked for {tmp_path}/no.jsonl);"
        " name a JSONL, JSON or Parquet file"
    )


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(
        DataError, match=r"^data\.train: .* is a folder; name a JSONL, JSON or Parquet file"
    ):
        SourceFile(str(tmp_path), "data.train")


def test_a_file_that_cant_be_opened_is_told_with_the_systems_reason():
    name = "x" * 300
    with pytest.raises(DataError, match=rf"^data\.train: {name}: can't be read: File name too"):
        SourceFile(name, "data.train")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("num_reads", range(5))  # of the heads, of the digest, of the rows
def test_a_disk_that_fails_while_a_file_is_read_is_told(tmp_path, monkeypatch, suffix, num_reads):
    path = tmp_path / f"d.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.table({"a": list(range(1_000))}), path)
    else:
        path.write_bytes((b"[" if suffix == "json" else b"") + b'{"a": 1}\n' * 1_000)
    left = [num_reads]
    monkeypatch.setattr(Path, "open", lambda path, _mode: FailingFile(path, left))

    def use():
        source = open_source(str(path), "data.train")
        return source.sha256, list(source.records())

    with pytest.raises(DataError) as caught:
        use()
    (fault,) = caught.value.faults
    assert "Input/output error" in fault
    assert str(path) in fault


class FailingFile(io.FileIO):
    """A file whose disk fails once no read is `left`, of this or another file."""

    def __init__(self, path: Path, left: list[int]) -> None:
        super().__init__(path)
        self._left = left

    def _count(self) -> None:
        self._left[0] -= 1
        if self._left[0] < 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def read(self, size: int = -1) -> bytes:
        self._count()
        return super().read(size)

    def readline(self, size: int = -1) -> bytes:
        self._count()
        return super().readline(size)


@pytest.mark.parametrize("content", [b'{"a": 1}\n\n{"a":\n', b'[\n{"a": 1}\n]\n'])
def test_the_digest_is_that_of_the_files_bytes(tmp_path, content):
    path = tmp_path / "d.json"
    path.write_bytes(content)
    source = SourceFile(str(path), "data.train")
    list(source.records())
    assert source.sha256 == hashlib.sha256(content).hexdigest()


def test_no_content_is_changed_on_the_way(tmp_path):
    fields = {"text": 'tab\t \\ " \u00e9 \U0001f600 \u0000', "n": [1, None, {"k": 2.5}]}
    (record,) = read(tmp_path / "d.jsonl", json.dumps(fields).encode())
    assert record.fields == fields
