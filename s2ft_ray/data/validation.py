"""A whole data file, read, checked and encoded before anything else starts.

Every row is looked at, whatever the rows before it were like; the rows stream through in
batches, so memory holds the encoded rows and one batch of text.

Invariant: a row is either encoded or faulty, and each faulty one is counted; the first
``NUM_SHOWN`` faults are kept as lines ``file:line: field: what is wrong; way out``.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import pyarrow as pa
from datasets import Dataset, DatasetInfo, Features, List, Value
from datasets.table import InMemoryTable

from s2ft_ray.data.encoding import EncodedRow, Encoder, RowFault
from s2ft_ray.data.formats import KNOWN_FORMATS, Format, detect_format, find_faults
from s2ft_ray.data.source import Record, SourceFile

NUM_SHOWN = 20
ROWS_PER_BATCH = 1_000
FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "target_mask": List(Value("bool")),
        "prompt_len": Value("int32"),
        "line": Value("int64"),
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
    source: SourceFile, encoder: Encoder, row_format: Format | Literal["auto"], faults: Faults
) -> ValidatedFile:
    """Read a whole file; what is wrong with its rows goes to `faults`.

    ``auto`` takes the format of the first row that fits one; every other row must have it too.
    """
    known: Format | None = None if row_format == "auto" else row_format
    tables: list[pa.Table] = []
    num_read = num_truncated = 0
    for batch in _batched(source.records()):
        if known is None:
            known = next(filter(None, (detect_format(record.fields) for record in batch)), None)
        rows = list(_encode_batch(batch, source.path, encoder, known, faults))
        num_read += len(batch)
        num_truncated += sum(row.is_truncated for _, row in rows)
        tables.append(_to_table(rows))
    return ValidatedFile(
        path=source.path,
        sha256=source.sha256,
        format=known,
        rows=_to_dataset(tables, source.sha256),
        num_read=num_read,
        num_truncated=num_truncated,
    )


def _batched(records: Iterator[Record]) -> Iterator[list[Record]]:
    while batch := list(itertools.islice(records, ROWS_PER_BATCH)):
        yield batch


def _encode_batch(
    batch: list[Record], path: str, encoder: Encoder, row_format: Format | None, faults: Faults
) -> Iterator[tuple[int, EncodedRow]]:
    found = [_find_record_faults(record, row_format) for record in batch]
    good = [record.fields for record, wrong in zip(batch, found, strict=True) if not wrong]
    encoded = iter(encoder.encode(good, row_format) if row_format and good else [])
    for record, wrong in zip(batch, found, strict=True):
        row = None if wrong else next(encoded)
        if isinstance(row, EncodedRow):
            yield record.line, row
        else:
            faults.add(f"{path}:{record.where}", [row.text] if isinstance(row, RowFault) else wrong)


def _find_record_faults(record: Record, row_format: Format | None) -> list[str]:
    if record.fault is not None:
        return [record.fault]
    if row_format is None:
        keys = ", ".join(record.fields) or "none"
        return [f"its keys ({keys}) fit no known format; known: {KNOWN_FORMATS}; rename the keys"]
    return find_faults(record.fields, row_format)


def _to_table(rows: list[tuple[int, EncodedRow]]) -> pa.Table:
    columns = {
        "input_ids": [row.input_ids for _, row in rows],
        "target_mask": [row.target_mask for _, row in rows],
        "prompt_len": [row.prompt_len for _, row in rows],
        "line": [line for line, _ in rows],
    }
    return pa.Table.from_pydict(columns, schema=FEATURES.arrow_schema)


def _to_dataset(tables: list[pa.Table], fingerprint: str) -> Dataset:
    """Join the tables in memory; a given fingerprint spares datasets the hashing of all rows."""
    table = pa.concat_tables(tables) if tables else _to_table([])
    info = DatasetInfo(features=FEATURES)
    return Dataset(InMemoryTable(table), info=info, fingerprint=fingerprint[:16])
