import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from s2ft_ray.config import RunConfig, parse_config
from s2ft_ray.finetune import inputs, main
from s2ft_ray.finetune.inputs import expected_rows, settle


@pytest.fixture
def upload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as Ray unpacks an upload; the home and the working folder of a driver in it."""
    folder = tmp_path / "session" / "working_dir_files" / "_ray_pkg_0a1b"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "rows.jsonl").write_text('{"text": "one"}\n')
    monkeypatch.setenv("S2FT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(folder)
    return folder


def run(**sections: Any) -> RunConfig:
    return parse_config({"tenant": "acme", "name": "bot", **sections})


def test_files_of_an_upload_outlive_it(upload: Path, tmp_path: Path) -> None:
    settled = settle(run(data={"train": "data/rows.jsonl"}))
    kept = Path(str(settled.data.train))
    assert kept.is_relative_to(tmp_path / "home" / "files")
    assert kept.name == "rows.jsonl"
    assert kept.read_bytes() == (upload / "data" / "rows.jsonl").read_bytes()


def test_the_same_bytes_are_kept_once_and_other_bytes_elsewhere(upload: Path) -> None:
    config = run(data={"train": "data/rows.jsonl"})
    first, again = settle(config), settle(config)
    assert again == first
    (upload / "data" / "rows.jsonl").write_text('{"text": "two"}\n')
    assert settle(config).data.train != first.data.train
    assert Path(str(first.data.train)).read_text() == '{"text": "one"}\n'


def test_several_files_and_the_folder_of_a_base_are_kept_too(upload: Path, tmp_path: Path) -> None:
    base = upload / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    train = [{"path": "data/rows.jsonl", "weight": 2.0}]
    settled = settle(run(data={"train": train}, model={"name_or_path": "./base"}))
    (file,) = settled.data.train_files
    assert Path(file.path).is_relative_to(tmp_path / "home")
    assert file.weight == 2.0
    assert (Path(settled.model.name_or_path) / "config.json").read_text() == "{}"


def test_a_file_elsewhere_stays_where_it_is_and_gets_its_full_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path)
    settled = settle(run(data={"train": "rows.jsonl"}))
    assert settled.data.train == os.path.abspath("rows.jsonl")


@pytest.mark.parametrize("name", ["s3://bucket/rows.jsonl", "org/dataset", "s2ft://tiny"])
@pytest.mark.usefixtures("upload")
def test_names_that_are_no_local_paths_stay_as_they_are(name: str) -> None:
    assert settle(run(data={"train": name})).data.train == name


@pytest.mark.usefixtures("upload")
def test_the_storage_is_named_for_good(tmp_path: Path) -> None:
    config = settle(run(data={"train": "x"}))
    assert config.checkpoint.storage_path == str(tmp_path / "home" / "runs")


def test_whatever_else_names_a_path_gets_its_full_path_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "held_out.jsonl").write_text("{}")
    (tmp_path / "template.jinja").write_text("{{ messages }}")
    (tmp_path / "adapter").mkdir()
    monkeypatch.chdir(tmp_path)
    settled = settle(
        run(
            data={
                "train": "held_out.jsonl",
                "eval": "held_out.jsonl",
                "chat_template": "template.jinja",
            },
            registry={"parent": "adapter"},
            checkpoint={"storage_path": "runs"},
        )
    )
    assert settled.data.eval == str(tmp_path / "held_out.jsonl")
    assert settled.data.chat_template == "{{ messages }}"
    assert settled.registry.parent == str(tmp_path / "adapter")
    assert settled.checkpoint.storage_path == str(tmp_path / "runs")


@pytest.mark.parametrize("flag", [["--profile"], []])
def test_the_profile_flag_is_the_runs_own_setting(
    flag: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, planned = tmp_path / "run.yaml", list[RunConfig]()
    path.write_text("tenant: acme\nname: bot\ndata: {train: rows.jsonl}\n")

    def plan(config: RunConfig) -> SimpleNamespace:
        planned.append(config)
        return SimpleNamespace(describe=str)

    monkeypatch.setattr(main, "_plan", plan)
    assert main.main(["--config", str(path), "--dry-run", *flag]) == 0
    assert planned[0].tracking.profile is bool(flag)


def test_the_rows_of_a_run_are_known_to_the_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines, table, array = (tmp_path / f"rows.{kind}" for kind in ("jsonl", "parquet", "json"))
    lines.write_text('{"text": "some words"}\n' * 200 + '{"text": "the last"}')
    parquet.write_table(pyarrow.table({"text": ["a", "b", "c"]}), table)
    array.write_text('[{"text": "a"}]')
    both = [{"path": str(lines), "weight": 0.5}, {"path": str(table), "weight": 4}]

    def rows(train: Any, **length: Any) -> int | None:
        optim = {"global_batch_size": 16, **(length or {"epochs": 2.0})}
        return expected_rows(run(data={"train": train}, optim=optim))

    assert rows(str(lines)) == 402
    assert rows(both) == 225
    assert rows(str(lines), max_steps=10) == 160
    monkeypatch.setattr(inputs, "_COUNTED_BYTES", 230)  # ten lines
    assert rows(str(lines)) == pytest.approx(402, abs=2)
    for unknown in (str(array), str(tmp_path / "none.jsonl"), "s3://bucket/rows.jsonl"):
        assert rows([{"path": unknown}, *both]) is None
    assert expected_rows(run(data={"train": str(lines), "packing": True})) is None
