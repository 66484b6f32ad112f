"""Prepared data: the split, the report, and what workers load."""

import dataclasses
import hashlib
import json
from pathlib import Path

import datasets
import pytest
from data_parts import (
    BOS_TEMPLATE,
    PLAIN_TEMPLATE,
    bytelevel_tokenizer,
    data_config,
    instruction_row,
    write_rows,
)
from full_disk import file_limit
from transformers import AutoTokenizer

from s2ft_ray.data import PreparedData, encode_prompt, prepare_data, preview
from s2ft_ray.data.prepared import count_held_out
from s2ft_ray.data.validation import FEATURES
from s2ft_ray.errors import DataError

SHARED = Path(__file__).parents[3] / "shared"


def prepare(tmp_path, num_rows=100, seed=0, tokenizer=None, **changes) -> PreparedData:
    path = write_rows(tmp_path / "d.jsonl", [instruction_row(i, i % 7) for i in range(num_rows)])
    return prepare_data(data_config(path, **changes), tokenizer or bytelevel_tokenizer(), seed)


@pytest.mark.parametrize(
    ("num_rows", "held_out"), [(2, 1), (10, 1), (100, 5), (10_240, 512), (10**6, 512)]
)
def test_a_twentieth_is_held_out_at_least_one_and_at_most_512(num_rows, held_out):
    assert count_held_out(num_rows) == held_out


def test_every_row_is_trained_on_or_held_out(tmp_path):
    data = prepare(tmp_path, 50)
    assert (len(data.train), len(data.eval)) == (48, 2)
    assert sorted([*data.train["line"], *data.eval["line"]]) == list(range(1, 51))


def test_the_seed_decides_what_is_held_out(tmp_path):
    held_out = [tuple(prepare(tmp_path, seed=seed).eval["line"]) for seed in (0, 0, 1)]
    assert held_out[0] == held_out[1] != held_out[2]


def test_nothing_is_held_out_where_an_eval_file_is_named(tmp_path):
    held_out = write_rows(tmp_path / "e.jsonl", [instruction_row(i) for i in range(3)])
    data = prepare(tmp_path, 1, eval=held_out)
    assert (len(data.train), len(data.eval)) == (1, 3)


def test_a_report_for_which_there_is_room_in_part_is_none(tmp_path):
    data = prepare(tmp_path, 10)
    report = dataclasses.replace(data.report, notes=["x" * 2**20])
    with file_limit(2**19), pytest.raises(OSError, match="File too large"):
        dataclasses.replace(data, report=report).save(tmp_path / "data")
    assert not (tmp_path / "data" / "report.json").exists()
    data.save(tmp_path / "data")
    assert PreparedData.load(tmp_path / "data").report == data.report


def test_an_array_gives_the_rows_of_the_lines(tmp_path):
    rows = [instruction_row(i) for i in range(20)]
    lines = write_rows(tmp_path / "d.jsonl", rows)
    array = tmp_path / "d.json"
    array.write_text(json.dumps(rows), encoding="utf-8")  # all of it on line 1
    tokenizer = bytelevel_tokenizer()
    one, two = (prepare_data(data_config(str(p)), tokenizer, 0) for p in (lines, array))
    assert list(one.train["input_ids"]) == list(two.train["input_ids"])


def test_the_report_counts_what_the_rows_hold(tmp_path):
    data = prepare(tmp_path, max_seq_len=30)
    ids = list(data.train["input_ids"])
    lengths = sorted(map(len, ids))
    report = data.report
    digest = hashlib.sha256((tmp_path / "d.jsonl").read_bytes()).hexdigest()
    assert (report.format, report.rows, report.eval_rows) == ("instruction", 95, 5)
    assert (report.digest, report.sources[0].sha256) == (digest, digest)
    assert (report.tokens, report.tokens_max) == (sum(lengths), lengths[-1])
    assert report.target_tokens == sum(map(sum, data.train["target_mask"]))
    assert (report.tokens_p50, report.tokens_p99) == (lengths[47], lengths[94])
    assert (report.dropped, report.dropped_rows, report.notes) == (0, [], [])
    everything = [*ids, *data.eval["input_ids"]]
    unended = sum(row[-1] != bytelevel_tokenizer().eos_token_id for row in everything)
    assert report.truncated == unended > 0


def test_the_digest_of_two_files_is_that_of_both(tmp_path):
    held_out = write_rows(tmp_path / "e.jsonl", [instruction_row(7)])
    report = prepare(tmp_path, 5, eval=held_out).report
    digests = [
        hashlib.sha256((tmp_path / f"{name}.jsonl").read_bytes()).hexdigest() for name in "de"
    ]
    assert [source.sha256 for source in report.sources] == digests
    assert report.digest == hashlib.sha256("".join(digests).encode()).hexdigest()


def test_what_is_loaded_is_what_was_saved(tmp_path, capfd):
    data = prepare(tmp_path, num_rows=30)
    data.save(tmp_path / "data")
    loaded = PreparedData.load(tmp_path / "data")
    assert loaded.report == data.report
    assert loaded.eval_prompts == data.eval_prompts
    for name in ("train", "eval"):
        mine, theirs = getattr(data, name), getattr(loaded, name)
        assert mine.column_names == list(FEATURES)
        assert mine.to_dict() == theirs.to_dict()
    assert capfd.readouterr() == ("", "")  # no progress bars in a job's log


def test_saving_again_replaces_what_was_there(tmp_path):
    prepare(tmp_path, num_rows=30).save(tmp_path / "data")
    data = prepare(tmp_path, num_rows=20)
    data.save(tmp_path / "data")
    assert PreparedData.load(tmp_path / "data").train.to_dict() == data.train.to_dict()


def test_a_folder_without_complete_data_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no complete prepared data"):
        PreparedData.load(tmp_path)
    prepare(tmp_path).save(tmp_path / "data")
    next((tmp_path / "data" / "train").glob("*.arrow")).unlink()
    with pytest.raises(DataError, match="data: holds no complete prepared data"):
        PreparedData.load(tmp_path / "data")


def test_preparing_writes_no_cache(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    prepare(tmp_path).save(tmp_path / "data")
    PreparedData.load(tmp_path / "data")
    assert not cache.exists()


@pytest.mark.parametrize("template", [None, BOS_TEMPLATE])
@pytest.mark.parametrize("train_on", ["completion", "all"])
def test_eval_prompts_are_the_prompts_of_inference(tmp_path, template, train_on):
    tokenizer = bytelevel_tokenizer(chat_template=template)
    data = prepare(tmp_path, 400, tokenizer=tokenizer, train_on=train_on)
    assert len(data.eval_prompts) == 16
    for prompt, line in zip(data.eval_prompts, data.eval["line"], strict=False):
        row = instruction_row(line - 1, (line - 1) % 7)
        assert prompt.input_ids == encode_prompt(row, tokenizer)
        assert tokenizer.decode(prompt.input_ids) == "<bos>" + prompt.prompt
        assert prompt.expected == row["output"]


def test_an_eval_prompt_of_plain_text_is_its_first_half(tmp_path):
    path = write_rows(tmp_path / "d.jsonl", [{"text": "once upon a time"}] * 2)
    data = prepare_data(data_config(path), bytelevel_tokenizer(), 0)
    (prompt,) = data.eval_prompts
    assert len("once") < len(prompt.prompt) < len("once upon a time")
    assert "once upon a time".startswith(prompt.prompt)
    assert "once upon a time".endswith(prompt.expected)
    assert "".join((prompt.prompt + prompt.expected).split()) == "onceuponatime"


def test_what_a_template_leaves_out_is_noted(tmp_path):
    tokenizer = bytelevel_tokenizer(chat_template=PLAIN_TEMPLATE.replace("eos_token", "''"))
    bos, eos = prepare(tmp_path, tokenizer=tokenizer).report.notes
    assert bos.startswith("the chat template doesn't write <bos>, which the tokenizer puts before")
    assert eos.startswith("the chat template doesn't end an answer with <eos>")
    tokenizer = bytelevel_tokenizer(chat_template=BOS_TEMPLATE)
    assert prepare(tmp_path, tokenizer=tokenizer).report.notes == []


def test_a_preview_shows_the_loss_mask(tmp_path):
    tokenizer = bytelevel_tokenizer()
    path = write_rows(tmp_path / "d.jsonl", [{"prompt": "two and", "completion": " four"}] * 2)
    row = prepare_data(data_config(path), tokenizer, 0).train[0]
    assert preview(row, tokenizer) == "[<bos>two and] four<eos>"
    assert preview(row, tokenizer, color=True) == "\x1b[2m<bos>two and\x1b[0m four<eos>"


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared beside the repository")
def test_the_math_data_on_the_stories_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / "stories260k")
    train = SHARED / "data" / "math" / "train.jsonl"
    held_out = str(SHARED / "data" / "math" / "test_svamp.jsonl")
    config = data_config(str(train), eval=held_out, invalid_rows="drop", max_seq_len=320)
    data = prepare_data(config, tokenizer, 0)
    assert (data.report.rows, data.report.dropped, data.report.eval_rows) == (3234, 26, 1000)
    assert {176, 1449, 2921}.isdisjoint(data.train["line"])  # their output is empty
    assert data.report.tokens_max == 320
    assert all(map(any, data.train["target_mask"]))
    assert preview(data.train[0], tokenizer).startswith("[<s> ### Instruction:\nJulia played tag")
