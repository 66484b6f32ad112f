"""Preference rows and weighted rows: what they become, and what is told of faulty ones."""

import math

import pytest
import torch
from data_parts import (
    PLAIN_TEMPLATE,
    bytelevel_tokenizer,
    data_config,
    instruction_row,
    write_rows,
)

from s2ft_ray.config import parse_config
from s2ft_ray.data import TrainLoader, encode_prompt, eval_batches, prepare_data
from s2ft_ray.errors import ConfigError, DataError

PAIRS = [
    {"prompt": f"Is {n} odd?", "chosen": " yes" if n % 2 else " no", "rejected": " perhaps not"}
    for n in range(20)
]


def prepare(tmp_path, rows, **changes):
    path = write_rows(tmp_path / "rows.jsonl", rows)
    return prepare_data(data_config(path, **changes), bytelevel_tokenizer(), 0)


def loader_of(data, *, rank=0, world_size=1):
    return TrainLoader(
        data.train,
        global_batch_size=4,
        micro_batch_size=2,
        rank=rank,
        world_size=world_size,
        seed=0,
        pad_id=0,
    )


def test_a_pair_is_two_rows_that_share_the_prompt(tmp_path):
    data = prepare(tmp_path, PAIRS)
    assert data.report.format == "preference"
    step = loader_of(data).next_step()
    assert (step.normalizer, len(step.lines), len(step.micro_batches)) == (4.0, 4, 2)
    batch = step.micro_batches[0]
    assert batch.input_ids.shape[0] == 4  # two pairs
    tokenizer = bytelevel_tokenizer()
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in batch.input_ids]
    for chosen, rejected in (texts[:2], texts[2:]):
        assert chosen.endswith((" yes", " no"))
        assert rejected.endswith(" perhaps not")
        assert chosen.partition("?")[0] == rejected.partition("?")[0]


def test_a_pairs_answers_both_count(tmp_path):
    data = prepare(tmp_path, PAIRS)
    masks = [*data.train["target_mask"], *data.train["rejected_mask"]]
    report = data.report
    assert report.tokens == sum(map(len, masks))
    assert report.tokens_max == max(map(len, data.train["rejected_mask"]))
    assert report.target_tokens == sum(map(sum, masks))


def test_held_out_pairs_stay_pairs(tmp_path):
    data = prepare(tmp_path, PAIRS)
    (batch,) = eval_batches(data.eval, 4, 0, 1, 0)
    assert batch is not None
    assert batch.input_ids.shape[0] == 2 * len(data.eval)
    assert data.eval_prompts[0].expected in ("yes", "no")


def test_a_prompt_of_turns_goes_through_the_chat_template(tmp_path):
    asked = [{"role": "user", "content": "Is 3 odd?"}]
    rows = [{"prompt": asked, "chosen": "yes", "rejected": "perhaps"}] * 4 + PAIRS[:4]
    tokenizer = bytelevel_tokenizer(chat_template=PLAIN_TEMPLATE)
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    held_out = write_rows(tmp_path / "held.jsonl", rows[:1])
    data = prepare_data(data_config(path, eval=held_out), tokenizer, 0)
    row = data.train[0]
    for ids, mask, answer in (
        (row["input_ids"], row["target_mask"], "yes"),
        (row["rejected_ids"], row["rejected_mask"], "perhaps"),
    ):
        chat = [*asked, {"role": "assistant", "content": answer}]
        assert tokenizer.apply_chat_template(chat, tokenize=False).startswith(tokenizer.decode(ids))
        assert ids[-1] == tokenizer.eos_token_id
        targets = [token for token, is_target in zip(ids, mask, strict=True) if is_target]
        assert tokenizer.decode(targets).startswith(answer)
    assert ids[: row["prompt_len"]] == encode_prompt(rows[0], tokenizer)
    literal = data.train[4]["input_ids"]
    assert tokenizer.decode(literal, skip_special_tokens=True) == "Is 0 odd? no"
    with pytest.raises(ConfigError, match=r"data\.chat_template: is needed"):
        prepare_data(data_config(path), bytelevel_tokenizer(), 0)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (
            {"prompt": [{"role": "assistant", "content": "a"}], "chosen": "b", "rejected": "c"},
            "prompt[0].role: is assistant where user must stand",
        ),
        (
            {"prompt": [{"role": "user"}], "chosen": "b", "rejected": "c"},
            "prompt[0].content: is missing",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "rejected: is the same as chosen"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "rejected: is empty"),
        ({"prompt": "a", "chosen": 3, "rejected": "b"}, "chosen: is the int 3; write text"),
        ({"prompt": "a", "chosen": "b"}, "rejected: is missing from this preference row"),
        ({"prompt": "a" * 600, "chosen": "b", "rejected": "c"}, "chosen: no target token is left"),
    ],
)
def test_a_faulty_pair_is_told(tmp_path, row, told):
    with pytest.raises(DataError) as caught:
        prepare(tmp_path, [*PAIRS, row], format="preference")
    assert caught.value.faults[0].partition(":21: ")[2].startswith(told)


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"objective": {"loss": "dpo"}, "data": {"format": "chat"}}, "objective.loss dpo with"),
        ({"data": {"format": "preference"}}, "objective.loss cross_entropy with data.format"),
        ({"objective": {"loss": "dpo"}, "data": {"packing": True}}, "data.packing and"),
        ({"objective": {"loss": "dpo", "label_smoothing": 0.1}}, "objective: label_smoothing and"),
    ],
)
def test_an_objective_that_the_data_cant_serve_is_refused(sections, told):
    data = {"train": "rows.jsonl", **sections.get("data", {})}
    with pytest.raises(ConfigError, match=told):
        parse_config({"tenant": "acme", "name": "bot", **sections, "data": data})


def test_a_rows_weight_is_its_tokens_weight_whatever_the_world_size(tmp_path):
    rows = [{**instruction_row(n), "importance": 0.5 + n % 3} for n in range(20)]
    data = prepare(tmp_path, rows, weight_key="importance")
    step = loader_of(data).next_step()
    weighted = 0.0
    for batch, lines in zip(step.micro_batches, (step.lines[:2], step.lines[2:]), strict=True):
        for labels, weights, line in zip(batch.labels, batch.weights, lines, strict=True):
            length = int((batch.input_ids[0] != 0).sum())
            expected = 0.5 + (line - 1) % 3
            assert weights[:5].tolist() == [expected] * 5, length
            weighted += expected * int((labels != -100).sum())
    assert step.normalizer == pytest.approx(weighted)
    parts = [loader_of(data, rank=rank, world_size=2).next_step() for rank in range(2)]
    assert {part.normalizer for part in parts} == {step.normalizer}
    assert all(batch.weights is None for batch in eval_batches(data.eval, 4, 0, 1, 0) if batch)


@pytest.mark.parametrize("weight", [0, -1, "2", None, math.inf, True])
def test_a_faulty_weight_is_told(tmp_path, weight):
    rows = [{**instruction_row(n), "weight": 1} for n in range(4)]
    text = [*rows, {**instruction_row(9), "weight": weight}]
    with pytest.raises(DataError, match=r"rows\.jsonl:5: weight: is .*; write a number above 0"):
        prepare(tmp_path, text, weight_key="weight")


def test_without_a_key_weights_are_no_weights(tmp_path):
    data = prepare(tmp_path, [{**instruction_row(n), "weight": "x"} for n in range(8)])
    batch = loader_of(data).next_step().micro_batches[0]
    assert batch.weights is None
    assert torch.is_tensor(batch.labels)
