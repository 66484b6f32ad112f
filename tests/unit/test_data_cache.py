"""A file is tokenized once; what is kept is what would be made, and never in memory."""

import pyarrow as pa
import pytest
from data_parts import bytelevel_tokenizer, data_config, instruction_row, write_rows

from s2ft_ray.data import prepare_data
from s2ft_ray.data.encoding import Encoder
from s2ft_ray.errors import DataError

ROWS = [instruction_row(number) for number in range(30)]


@pytest.fixture
def encoded(monkeypatch):
    """Counts the rows that are tokenized."""
    real, counted = Encoder.encode, []

    def encode(self, rows, row_format):
        counted.append(len(rows))
        return real(self, rows, row_format)

    monkeypatch.setattr(Encoder, "encode", encode)
    return counted


def prepare(path, cache, **changes):
    return prepare_data(data_config(path, **changes), bytelevel_tokenizer(), 0, cache)


def test_a_second_run_tokenizes_nothing_and_gets_the_same(tmp_path, encoded):
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    plain = prepare(path, None)
    first = prepare(path, tmp_path / "cache")
    assert encoded == [30, 30]
    second = prepare(path, tmp_path / "cache")
    assert encoded == [30, 30]
    assert plain.train.to_dict() == first.train.to_dict() == second.train.to_dict()
    assert plain.report == first.report == second.report


def test_other_bytes_or_another_encoding_are_made_anew(tmp_path, encoded):
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    prepare(path, tmp_path / "cache")
    prepare(path, tmp_path / "cache", max_seq_len=20)
    write_rows(tmp_path / "rows.jsonl", ROWS[:29])
    assert len(prepare(path, tmp_path / "cache").train) < 29
    assert encoded == [30, 30, 29]


def test_kept_faults_name_the_file_as_it_is_called_now(tmp_path, encoded):
    write_rows(tmp_path / "one.jsonl", [*ROWS, "{"])
    (tmp_path / "two.jsonl").write_bytes((tmp_path / "one.jsonl").read_bytes())
    for name in ("one", "two", "two"):
        data = prepare(str(tmp_path / f"{name}.jsonl"), tmp_path / "cache", invalid_rows="drop")
        (fault,) = data.report.dropped_rows
        assert fault.startswith(f"{tmp_path}/{name}.jsonl:31: is no valid JSON")
    assert encoded == [30]


def test_an_entry_that_was_deleted_is_made_again(tmp_path, encoded):
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    prepare(path, tmp_path / "cache")
    (entry,) = (tmp_path / "cache").iterdir()
    (entry / "file.json").unlink()
    (entry / "rows.arrow").unlink()
    entry.rmdir()
    prepare(path, tmp_path / "cache")
    assert encoded == [30, 30]
    assert [folder.name for folder in (tmp_path / "cache").iterdir()] == [entry.name]


def test_a_cache_that_cant_be_written_is_one_clear_fault(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"encoded rows can't be kept there .*; make room, or set"):
        prepare(write_rows(tmp_path / "rows.jsonl", ROWS), tmp_path / "cache")


def test_the_rows_of_a_large_file_stay_on_disk(tmp_path):
    rows = [{"text": f"{number} " + "x y " * 500} for number in range(3_000)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    del rows
    before = pa.total_allocated_bytes()
    data = prepare(path, tmp_path / "cache", max_seq_len=2_000)
    held = pa.total_allocated_bytes() - before
    on_disk = sum(file.stat().st_size for file in (tmp_path / "cache").rglob("rows.arrow"))
    assert data.report.tokens > 2_000_000
    assert on_disk > 8_000_000
    assert held < on_disk / 20
