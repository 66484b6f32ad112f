"""A whole data file, read, checked and encoded before anything else starts.

Every row is looked at, whatever the rows before it were like; the rows stream through in
batches, so memory holds one batch. With a cache the encoded rows go to disk and are mapped back:
a file may be larger than memory.

Invariant: a row is either encoded or faulty, and each faulty one is counted; the first
``NUM_SHOWN`` faults are kept as lines ``file:line: field: what is wrong; way out``.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from datasets import Dataset, DatasetInfo, Features, List, Value
from datasets.table import InMemoryTable, MemoryMappedTable, Table

from s2ft_ray.data.cache import CacheEntry
from s2ft_ray.data.encoding import EncodedRow, Encoder, RowFault
from s2ft_ray.data.formats import KNOWN_FORMATS, Format, detect_format, find_faults
from s2ft_ray.data.location import DataSource
from s2ft_ray.data.source import Record
from s2ft_ray.errors import DataError

NUM_SHOWN = 20
ROWS_PER_BATCH = 1_000
FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "target_mask": List(Value("bool")),
        "prompt_len": Value("int32"),
        "line": Value("int64"),
        "weight": Value("float32"),
        "rejected_ids": List(Value("int32")),
        "rejected_mask": List(Value("bool")),
    }
)


@dataclass
class Faults:
    """What was found wrong, over one or more files."""

    shown: list[str] = field(default_factory=list)
    num_rows: int = 0
    """Faulty rows."""
    num_faults: int = 0

    def add(self, where: str, faults: Iterable[str]) -> None:
        """Count one faulty row."""
        self.num_rows += 1
        for fault in faults:
            self.num_faults += 1
            if len(self.shown) < NUM_SHOWN:
                self.shown.append(f"{where}: {fault}")

    def extend(self, other: "Faults") -> None:
        """Add the faults of another file."""
        self.num_rows += other.num_rows
        self.num_faults += other.num_faults
        self.shown += other.shown[: NUM_SHOWN - len(self.shown)]


@dataclass(frozen=True)
class ValidatedFile:
    """The good rows of a file, encoded, in the file's order."""

    path: str
    sha256: str
    format: Format | None
    """None where no row fits any format."""
    rows: Dataset
    num_read: int
    """Rows, faulty ones included."""
    num_truncated: int


def validate_file(
    source: DataSource,
    encoder: Encoder,
    row_format: Format | Literal["auto"],
    faults: Faults,
    cache: Path | None = None,
) -> ValidatedFile:
    """Read a whole file; what is wrong with its rows goes to `faults`.

    ``auto`` takes the format of the first row that fits one; every other row must have it too.
    With a `cache` a file that was read before isn't read again.
    """
    if cache is None:
        buffer = pa.BufferOutputStream()
        file, found = _read_rows(source, encoder, row_format, buffer)
        faults.extend(found)
        table = InMemoryTable.from_buffer(buffer.getvalue())
        return _to_file(source, file, table)
    entry = CacheEntry(
        cache, file=source.sha256, encoder=encoder.identity, row_format=str(row_format)
    )
    about = entry.read()
    if about is None:
        about = _fill(entry, source, encoder, row_format)
    kept = about["faults"]
    prefix = about["path"]  # the same bytes may have had another name
    kept["shown"] = [source.path + line.removeprefix(prefix) for line in kept["shown"]]
    faults.extend(Faults(**kept))
    return _to_file(source, about["file"], MemoryMappedTable.from_file(str(entry.rows)))


def _fill(
    entry: CacheEntry, source: DataSource, encoder: Encoder, row_format: Format | Literal["auto"]
) -> dict[str, Any]:
    try:
        with pa.OSFile(str(entry.begin()), "wb") as sink:
            file, found = _read_rows(source, encoder, row_format, sink)
        about = {"path": source.path, "file": file, "faults": asdict(found)}
        entry.commit(about)
    except OSError as error:
        raise DataError(
            f"{entry.folder.parent}: encoded rows can't be kept there"
            f" ({error.strerror or error}); make room, or set S2FT_HOME to another disk"
        ) from error
    finally:
        entry.discard()
    return about


def _read_rows(
    source: DataSource,
    encoder: Encoder,
    row_format: Format | Literal["auto"],
    sink: pa.NativeFile,
) -> tuple[dict[str, Any], Faults]:
    """Encode the rows into `sink`; return the file's figures and its faults."""
    known: Format | None = None if row_format == "auto" else row_format
    faults = Faults()
    num_read = num_truncated = 0
    with pa.ipc.new_stream(sink, FEATURES.arrow_schema) as writer:
        for batch in _batched(source.records()):
            if known is None:
                known = next(filter(None, (detect_format(record.fields) for record in batch)), None)
            rows = list(_encode_batch(batch, source.path, encoder, known, faults))
            num_read += len(batch)
            num_truncated += sum(row.is_truncated for _, row in rows)
            writer.write_table(_to_table(rows))
    return {"format": known, "num_read": num_read, "num_truncated": num_truncated}, faults


def _to_file(source: DataSource, about: dict[str, Any], table: Table) -> ValidatedFile:
    # A given fingerprint spares datasets the hashing of all rows.
    info, fingerprint = DatasetInfo(features=FEATURES), source.sha256[:16]
    rows = Dataset(table, info=info, fingerprint=fingerprint)
    return ValidatedFile(path=source.path, sha256=source.sha256, rows=rows, **about)


def _batched(records: Iterator[Record]) -> Iterator[list[Record]]:
    while batch := list(itertools.islice(records, ROWS_PER_BATCH)):
        yield batch


def _encode_batch(
    batch: list[Record], path: str, encoder: Encoder, row_format: Format | None, faults: Faults
) -> Iterator[tuple[int, EncodedRow]]:
    found = [_find_record_faults(record, row_format, encoder.weight_key) for record in batch]
    good = [record.fields for record, wrong in zip(batch, found, strict=True) if not wrong]
    encoded = iter(encoder.encode(good, row_format) if row_format and good else [])
    for record, wrong in zip(batch, found, strict=True):
        row = None if wrong else next(encoded)
        if isinstance(row, EncodedRow):
            weight = 1.0 if encoder.weight_key is None else record.fields[encoder.weight_key]
            yield record.line, replace(row, weight=weight)
        else:
            faults.add(f"{path}:{record.where}", [row.text] if isinstance(row, RowFault) else wrong)


def _find_record_faults(
    record: Record, row_format: Format | None, weight_key: str | None
) -> list[str]:
    if record.fault is not None:
        return [record.fault]
    if row_format is None:
        keys = ", ".join(record.fields) or "none"
        return [f"its keys ({keys}) fit no known format; known: {KNOWN_FORMATS}; rename the keys"]
    faults = find_faults(record.fields, row_format)
    if weight_key is not None:
        faults += _find_weight_faults(record.fields.get(weight_key), weight_key)
    return faults


def _find_weight_faults(weight: Any, key: str) -> list[str]:
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if is_number and 0 < weight < math.inf:
        return []
    shown = "is missing" if weight is None else f"is {weight!r}"
    return [f"{key}: {shown}; write a number above 0 (data.weight_key names it)"]


def _to_table(rows: list[tuple[int, EncodedRow]]) -> pa.Table:
    columns = {
        "input_ids": [row.input_ids for _, row in rows],
        "target_mask": [row.target_mask for _, row in rows],
        "prompt_len": [row.prompt_len for _, row in rows],
        "line": [line for line, _ in rows],
        "weight": [row.weight for _, row in rows],
        "rejected_ids": [row.rejected_ids for _, row in rows],
        "rejected_mask": [row.rejected_mask for _, row in rows],
    }
    return pa.Table.from_pydict(columns, schema=FEATURES.arrow_schema)
