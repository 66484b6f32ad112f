"""A data file as numbered JSON objects: JSONL, or one JSON array of objects.

Invariant: every row keeps the line on which it begins, whatever stands around it (blank lines, a
byte order mark, an array's brackets), and a row that can't be read doesn't hide those after it.
JSONL is streamed; an array is read whole.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, BinaryIO

from s2ft_ray.data.files import digest_file, open_file
from s2ft_ray.errors import DataError

UTF8_BOM = b"\xef\xbb\xbf"
UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
WANTED = "write one JSON object per line (JSONL), or one JSON array of objects"
AS_UTF8 = "save the file as UTF-8"


@dataclass(frozen=True, slots=True)
class Record:
    """A row as it stands in the file; `fault` says why there are no `fields`."""

    line: int
    fields: dict[str, Any]
    fault: str | None = None
    where: str = ""
    """What a fault names: the line, and in an array, where lines may not tell rows apart, both."""


class SourceFile:
    """A readable data file, local or behind a URL.

    `key` is the config's key that named the file. Raises DataError where nothing can be read.
    """

    def __init__(self, path: str, key: str) -> None:
        self.path = path
        self._key = key
        with open_file(path, key) as file:
            head = file.read(4096)
        if head.startswith(UTF16_BOMS):
            raise DataError(f"{path}:1: is UTF-16; {AS_UTF8}")
        self._is_array = head.removeprefix(UTF8_BOM).lstrip().startswith(b"[")

    @cached_property
    def sha256(self) -> str:
        """Digest of the file's bytes, in hex."""
        return digest_file(self.path, self._key)

    def records(self) -> Iterator[Record]:
        """Read the rows in order. Raises DataError where the rest of an array can't be read."""
        with open_file(self.path, self._key) as file:
            yield from self._array(file) if self._is_array else self._lines(file)

    def _lines(self, file: BinaryIO) -> Iterator[Record]:
        for number, raw in enumerate(file, 1):
            content = raw.removeprefix(UTF8_BOM) if number == 1 else raw
            if content.isspace() or not content:
                continue
            if number == 1 and content.strip() == b"{":
                raise DataError(f"{self.path}:1: an object goes on over several lines; {WANTED}")
            yield _parse_line(number, content.rstrip())

    def _array(self, file: BinaryIO) -> Iterator[Record]:
        raw = file.read()
        try:
            text = raw.removeprefix(UTF8_BOM).decode("utf-8")
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            raise DataError(f"{self.path}:{line}: {_describe_bytes(error)}") from error
        try:
            yield from _parse_array(text)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{self.path}:{error.lineno}: is no valid JSON at column {error.colno}:"
                f" {error.msg}; the array can't be read from here on; {WANTED}"
            ) from error


class _DuplicateKeyError(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _DuplicateKeyError(f"{twice}: the key stands twice in one object; keep one of them")
    return fields


_decoder = json.JSONDecoder(object_pairs_hook=_object)
_lenient_decoder = json.JSONDecoder(parse_int=str)  # finds the end of a row that it doesn't keep


def _parse_line(line: int, raw: bytes) -> Record:
    try:
        return _record(_decoder.decode(raw.decode("utf-8")), line, str(line))
    except UnicodeDecodeError as error:
        fault = _describe_bytes(error)
    except json.JSONDecodeError as error:
        fault = f"is no valid JSON at column {error.colno}: {error.msg}; {WANTED}"
    except (ValueError, RecursionError) as error:  # a key twice, a number or a nesting too large
        fault = str(error)
    return Record(line, {}, fault, str(line))


def _record(value: Any, line: int, where: str) -> Record:
    if isinstance(value, dict):
        return Record(line, value, None, where)
    return Record(line, {}, f"is a JSON {_json_type(value)}, not an object; {WANTED}", where)


def _parse_array(text: str) -> Iterator[Record]:
    line, counted, number = 1, 0, 0
    position = _skip_space(text, text.index("[") + 1)
    while not text.startswith("]", position):
        if number:
            if not text.startswith(",", position):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
            position = _skip_space(text, position + 1)
        number += 1
        line += text.count("\n", counted, position)
        counted = position
        where = f"{line} (row {number})"
        try:
            value, position = _decoder.raw_decode(text, position)
            yield _record(value, line, where)
        except json.JSONDecodeError:
            raise
        except ValueError as error:  # a key twice, a number too large
            _, position = _lenient_decoder.raw_decode(text, position)
            yield Record(line, {}, str(error), where)
        except RecursionError as error:
            raise json.JSONDecodeError(str(error), text, position) from error
        position = _skip_space(text, position)
    rest = _skip_space(text, position + 1)
    if rest < len(text):
        raise json.JSONDecodeError("Extra data", text, rest)


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _describe_bytes(error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    place = error.start - error.object.rfind(b"\n", 0, error.start)
    return f"is no valid UTF-8 at byte {place} of the line (0x{byte:02x}); {AS_UTF8}"


def _json_type(value: Any) -> str:
    names = {list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
