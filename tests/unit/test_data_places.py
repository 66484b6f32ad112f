"""Where rows come from: Parquet, URLs, data sets of the Hugging Face library, several files."""

import json

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_parts import bytelevel_tokenizer, data_config, instruction_row, write_rows

from s2ft_ray.data import absolute_name, prepare_data
from s2ft_ray.data.location import open_source
from s2ft_ray.errors import DataError

ROWS = [instruction_row(number) for number in range(20)]


def prepare(train, **changes):
    return prepare_data(data_config(train, **changes), bytelevel_tokenizer(), 0)


@pytest.fixture
def wanted(tmp_path):
    return list(prepare(write_rows(tmp_path / "wanted.jsonl", ROWS)).train["input_ids"])


def test_a_parquet_file_gives_the_same_tokens(tmp_path, wanted):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=7)
    data = prepare(str(path))
    assert list(data.train["input_ids"]) == wanted
    assert sorted([*data.train["line"], *data.eval["line"]]) == list(range(1, 21))


def test_chats_in_parquet_are_chats(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = tmp_path / "chats.parquet"
    pq.write_table(pa.Table.from_pylist([{"messages": turns}] * 4), path)
    assert next(open_source(str(path), "data.train").records()).fields == {"messages": turns}


def test_a_damaged_parquet_file_is_one_clear_fault(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"rows\.parquet: is no sound Parquet file \(after row 0\)"):
        prepare(str(path))


def test_a_fault_in_a_table_names_the_row(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([*ROWS, {"instruction": "Say.", "output": ""}]), path)
    with pytest.raises(DataError, match=r"rows\.parquet:row 21: output: is empty"):
        prepare(str(path))


@pytest.mark.parametrize("scheme", ["memory://bucket", "file://"])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_url_gives_the_same_tokens(tmp_path, wanted, scheme, suffix):
    folder = scheme if scheme.startswith("memory") else f"file://{tmp_path}"
    url = f"{folder}/rows.{suffix}"
    with fsspec.open(url, "wb") as file:
        if suffix == "parquet":
            pq.write_table(pa.Table.from_pylist(ROWS), file)
        else:
            file.write("".join(json.dumps(row) + "\n" for row in ROWS).encode())
    assert list(prepare(url).train["input_ids"]) == wanted
    assert absolute_name(url) == url


@pytest.mark.parametrize(
    ("url", "told"),
    [
        (
            "memory://nobody/rows.jsonl",
            "data.train: memory://nobody/rows.jsonl: no such file; name",
        ),
        ("nothing://a/rows.jsonl", "data.train: nothing://a/rows.jsonl: can't be opened: Protocol"),
    ],
)
def test_a_url_that_cant_be_opened_is_one_clear_fault(url, told):
    with pytest.raises(DataError) as caught:
        prepare(url)
    (fault,) = caught.value.faults
    assert fault.startswith(told)


def test_a_saved_data_set_has_its_splits(tmp_path, wanted, monkeypatch):
    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": rows, "held": rows}).save_to_disk(tmp_path / "set")
    assert list(prepare(str(tmp_path / "set")).train["input_ids"]) == wanted
    data = prepare(f"{tmp_path}/set:train", eval=f"{tmp_path}/set:held")
    assert (len(data.train), len(data.eval)) == (20, 20)
    with pytest.raises(
        DataError, match=r"has no split validation; name one of .*set:train, .*:held"
    ):
        prepare(str(tmp_path / "set"), eval=str(tmp_path / "set"))
    monkeypatch.chdir(tmp_path)
    assert absolute_name("set:held") == f"{tmp_path}/set:held"


def test_a_folder_of_data_files_is_a_data_set(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "squad").mkdir()
    write_rows(tmp_path / "squad" / "train.jsonl", ROWS)
    write_rows(tmp_path / "squad" / "validation.jsonl", ROWS[:3])
    data = prepare(str(tmp_path / "squad"), eval=str(tmp_path / "squad"))
    assert (len(data.train), len(data.eval)) == (20, 3)


def test_a_hub_name_that_cant_be_loaded_is_one_clear_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    assert absolute_name("nobody/nothing:train") == "nobody/nothing:train"
    with pytest.raises(DataError) as caught:
        prepare("nobody/nothing")
    (fault,) = caught.value.faults
    assert fault.startswith("data.train: nobody/nothing: is no file here, and no data set that can")


def test_several_files_train_together_and_keep_their_rows_apart(tmp_path):
    one = write_rows(tmp_path / "one.jsonl", ROWS)
    two = write_rows(tmp_path / "two.jsonl", [instruction_row(n) for n in range(100, 130)])
    data = prepare([one, {"path": two, "weight": 0.5}])
    assert len(data.train) + len(data.eval) == 50
    assert [source.weight for source in data.report.sources] == [1.0, 0.5]
    (first, _), (second, _) = data.groups
    assert first + second == len(data.train)
    lines = data.train["line"]
    assert list(lines) == sorted(lines[:first]) + sorted(lines[first:])


def test_files_of_two_formats_are_refused(tmp_path):
    one = write_rows(tmp_path / "one.jsonl", ROWS)
    two = write_rows(tmp_path / "two.jsonl", [{"text": "a b"}])
    with pytest.raises(
        DataError, match=r"two\.jsonl:1: instruction: is missing: this is a text row"
    ):
        prepare([one, two])
