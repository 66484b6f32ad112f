"""Rows in object storage, by a local S3 server."""

import json
from collections.abc import Iterator
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer

from s2ft_ray.bases import load_tokenizer
from s2ft_ray.config import DataConfig, ModelConfig
from s2ft_ray.data import PreparedData, prepare_data
from s2ft_ray.errors import DataError

ROWS = [{"prompt": f"Number {n} is", "completion": " odd" if n % 2 else " even"} for n in range(40)]


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        environment.setenv("AWS_ACCESS_KEY_ID", "test")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "test")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        client = boto3.client("s3")
        client.create_bucket(Bucket="acme")
        folder = tmp_path_factory.mktemp("s3")
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        pq.write_table(pa.Table.from_pylist(ROWS), folder / "rows.parquet")
        for path in folder.iterdir():
            client.upload_file(str(path), "acme", path.name)
        yield "s3://acme"
    server.stop()


def prepare(url: str, cache: Path | None = None) -> PreparedData:
    return prepare_data(DataConfig(train=url), load_tokenizer(ModelConfig()), 0, cache)


def test_rows_in_s3_are_read_once_and_are_the_rows(bucket: str, tmp_path: Path) -> None:
    lines = prepare(f"{bucket}/rows.jsonl", tmp_path / "cache")
    again = prepare(f"{bucket}/rows.jsonl", tmp_path / "cache")
    table = prepare(f"{bucket}/rows.parquet")
    assert len(lines.train) == 38
    assert list(lines.train["input_ids"]) == list(again.train["input_ids"])
    assert list(lines.train["input_ids"]) == list(table.train["input_ids"])
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize("url", ["s3://acme/nothing.jsonl", "s3://nobody/rows.jsonl"])
def test_what_is_not_in_s3_is_one_clear_fault(url: str) -> None:
    with pytest.raises(DataError) as caught:
        prepare(url)
    (fault,) = caught.value.faults
    assert fault.startswith(f"data.train: {url}: no such file; name a JSONL")
