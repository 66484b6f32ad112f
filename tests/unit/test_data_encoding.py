"""What a row becomes: its tokens, its targets, and the prompt that inference has."""

from typing import Any

import pytest
from data_parts import (
    BOS_TEMPLATE,
    FORGETFUL_TEMPLATE,
    MARKED_TEMPLATE,
    PLAIN_TEMPLATE,
    bytelevel_tokenizer,
    spaced_tokenizer,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from s2ft_ray.data import encode_prompt, render_prompt
from s2ft_ray.data.encoding import EncodedRow, Encoder, RowFault
from s2ft_ray.data.formats import detect_format

CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi you"},
        {"role": "user", "content": "well?"},
        {"role": "assistant", "content": "good"},
    ]
}
BOTH_ANSWERS = "hi you<eos>good<eos>"


def encode(tokenizer, row: dict[str, Any], train_on="completion", max_seq_len=512) -> EncodedRow:
    encoder = Encoder(tokenizer, max_seq_len=max_seq_len, train_on=train_on)
    row_format = detect_format(row)
    assert row_format is not None
    (encoded,) = encoder.encode([row], row_format)
    assert isinstance(encoded, EncodedRow), encoded
    return encoded


def whole(tokenizer, row: EncodedRow) -> str:
    return tokenizer.decode(row.input_ids)


def targets(tokenizer, row: EncodedRow) -> str:
    pairs = zip(row.input_ids, row.target_mask, strict=True)
    return tokenizer.decode([token for token, is_target in pairs if is_target])


def test_an_instruction_row_without_a_template_uses_the_documented_layout():
    tokenizer = bytelevel_tokenizer()
    row = encode(tokenizer, {"instruction": "Add.", "input": "2 2", "output": "4", "answer": 4.0})
    prompt = "### Instruction:\nAdd.\n\n### Input:\n2 2\n\n### Response:\n"
    assert whole(tokenizer, row) == f"<bos>{prompt}4<eos>"
    assert targets(tokenizer, row) == "4<eos>"


@pytest.mark.parametrize("empty", [{}, {"input": ""}, {"input": " \n"}, {"input": None}])
def test_an_instruction_row_without_input_leaves_the_input_block_out(empty):
    row = {"instruction": "Say {x}.", "output": "x"} | empty
    prompt = render_prompt(row, bytelevel_tokenizer())
    assert prompt == "### Instruction:\nSay {x}.\n\n### Response:\n"


def test_an_instruction_row_with_a_template_is_one_user_turn():
    tokenizer = bytelevel_tokenizer(chat_template=PLAIN_TEMPLATE)
    row = encode(tokenizer, {"instruction": "Add.", "input": "2 2", "output": "4"})
    assert whole(tokenizer, row) == "user: Add.\n\n2 2<eos>\nassistant: 4<eos>"
    assert targets(tokenizer, row) == "4<eos>"


@pytest.mark.parametrize("template", [None, PLAIN_TEMPLATE])
def test_a_completion_row_is_taken_literally(template):
    tokenizer = bytelevel_tokenizer(chat_template=template)
    row = encode(tokenizer, {"prompt": "two and two are", "completion": " four"})
    assert whole(tokenizer, row) == "<bos>two and two are four<eos>"
    assert targets(tokenizer, row) == " four<eos>"


@pytest.mark.parametrize("train_on", ["completion", "assistant", "all"])
def test_a_text_row_is_all_target_but_for_the_bos(train_on):
    tokenizer = bytelevel_tokenizer()
    row = encode(tokenizer, {"text": "once upon"}, train_on)
    assert whole(tokenizer, row) == "<bos>once upon<eos>"
    assert row.target_mask == [False] + [True] * (len(row.input_ids) - 1)


def test_all_takes_the_prompt_as_target_too():
    tokenizer = bytelevel_tokenizer()
    row = encode(tokenizer, {"prompt": "two", "completion": " four"}, "all")
    assert targets(tokenizer, row) == "two four<eos>"
    assert row.input_ids[: row.prompt_len] == encode_prompt("two", tokenizer)


@pytest.mark.parametrize("train_on", ["completion", "assistant", "all"])
def test_without_a_bos_the_first_token_is_no_target(train_on):
    tokenizer = bytelevel_tokenizer(bos=False)
    row = encode(tokenizer, {"text": "once upon a time"}, train_on)
    assert whole(tokenizer, row) == "once upon a time<eos>"
    assert row.target_mask == [False] + [True] * (len(row.input_ids) - 1)


def test_bos_and_eos_that_a_row_brings_are_not_doubled():
    tokenizer = bytelevel_tokenizer()
    row = encode(tokenizer, {"prompt": "<bos>two", "completion": " four<eos>"})
    assert whole(tokenizer, row) == "<bos>two four<eos>"


def test_a_chats_bos_is_the_templates():
    for template, count in ((PLAIN_TEMPLATE, 0), (BOS_TEMPLATE, 1)):
        tokenizer = bytelevel_tokenizer(chat_template=template)
        row = encode(tokenizer, CHAT)
        assert row.input_ids.count(tokenizer.bos_token_id) == count
        assert encode_prompt(CHAT, tokenizer) == row.input_ids[: row.prompt_len]


@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, BOS_TEMPLATE, MARKED_TEMPLATE])
@pytest.mark.parametrize(
    ("train_on", "learned"), [("completion", "good<eos>"), ("assistant", BOTH_ANSWERS)]
)
def test_the_targets_of_a_chat_are_its_answers_with_their_end(template, train_on, learned):
    tokenizer = bytelevel_tokenizer(chat_template=template)
    row = encode(tokenizer, CHAT, train_on)
    assert targets(tokenizer, row) == learned
    text = tokenizer.apply_chat_template(CHAT["messages"], tokenize=False)
    assert whole(tokenizer, row) == text.rstrip("\n")


def test_all_of_a_chat_is_target_but_for_its_first_token():
    tokenizer = bytelevel_tokenizer(chat_template=BOS_TEMPLATE)
    row = encode(tokenizer, CHAT, "all")
    assert row.target_mask == [False] + [True] * (len(row.input_ids) - 1)


def test_the_mask_of_markers_is_that_of_transformers():
    tokenizer = bytelevel_tokenizer(chat_template=MARKED_TEMPLATE)
    theirs = tokenizer.apply_chat_template(
        CHAT["messages"], return_dict=True, return_assistant_tokens_mask=True
    )
    ours = encode(tokenizer, CHAT, "assistant")
    length = len(ours.input_ids)
    assert ours.input_ids == theirs["input_ids"][:length]
    assert ours.target_mask == [mask == 1 for mask in theirs["assistant_masks"][:length]]
    assert sum(theirs["assistant_masks"][length:]) == 0


def test_a_template_that_forgets_earlier_answers_serves_the_last_one():
    tokenizer = bytelevel_tokenizer(chat_template=FORGETFUL_TEMPLATE)
    row = encode(tokenizer, CHAT)
    assert targets(tokenizer, row) == "<think>good<eos>"
    encoder = Encoder(tokenizer, max_seq_len=512, train_on="assistant")
    (refused,) = encoder.encode([CHAT], "chat")
    assert isinstance(refused, RowFault)


def test_a_token_that_reaches_over_the_edge_is_cut_there():
    tokenizer = bytelevel_tokenizer()
    together = tokenizer("### Instruction", add_special_tokens=False)["input_ids"]
    row = encode(tokenizer, {"prompt": "### Instr", "completion": "uction"})
    assert len(together) < len(row.input_ids) - 2  # it is one token less when written in one
    assert row.input_ids[: row.prompt_len] == encode_prompt("### Instr", tokenizer)
    assert targets(tokenizer, row) == "uction<eos>"


def test_a_token_over_the_edge_of_an_earlier_answer_is_cut_there():
    template = (
        "{% for m in messages %}{{ m.role + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}"
    )
    tokenizer = bytelevel_tokenizer(chat_template=template)
    row = {
        "messages": [
            {"role": "user", "content": "hello "},
            {"role": "assistant", "content": "hell"},
            {"role": "user", "content": "o the"},
            {"role": "assistant", "content": "re"},
        ]
    }
    encoded = encode(tokenizer, row, "assistant")
    assert whole(tokenizer, encoded) == "userhello assistanthellusero theassistantre"
    assert targets(tokenizer, encoded) == "hellre"


def test_a_completion_gets_no_space_of_sentencepiece():
    tokenizer = spaced_tokenizer()
    row = encode(tokenizer, {"prompt": "say x", "completion": "abc"})
    tokens = tokenizer.convert_ids_to_tokens(row.input_ids)
    assert tokens == ["<bos>", *"▁say▁x", *"abc", "<eos>"]
    joined = encode(tokenizer, {"prompt": "say ", "completion": "abc"})  # ▁a reaches over
    assert tokenizer.convert_ids_to_tokens(joined.input_ids) == [
        *["<bos>", *"▁say▁"],
        *[*"abc", "<eos>"],
    ]


def test_truncation_cuts_the_end_and_is_told():
    tokenizer = bytelevel_tokenizer()
    fields = {"prompt": "two and two", "completion": " are four, I am sure"}
    full = encode(tokenizer, fields)
    cut = encode(tokenizer, fields, max_seq_len=full.prompt_len + 1)
    assert (full.is_truncated, cut.is_truncated) == (False, True)
    assert cut.input_ids == full.input_ids[: full.prompt_len + 1]
    assert cut.target_mask == [False] * full.prompt_len + [True]
    assert encode(tokenizer, fields, max_seq_len=len(full.input_ids)) == full


def test_a_row_without_a_target_after_truncation_is_a_fault():
    tokenizer = bytelevel_tokenizer()
    fields = {"prompt": "two and two", "completion": " are four"}
    length = len(encode_prompt("two and two", tokenizer))
    (fault,) = Encoder(tokenizer, max_seq_len=length, train_on="completion").encode(
        [fields], "completion"
    )
    assert isinstance(fault, RowFault)
    assert f"data.max_seq_len is {length}" in fault.text


@pytest.mark.parametrize(
    "prompt",
    [
        "hello",
        {"prompt": "hello"},
        {"instruction": "Greet."},
        {"text": "hello"},
        CHAT,
        CHAT["messages"][:-1],
        CHAT["messages"],
    ],
)
@pytest.mark.parametrize("template", [None, BOS_TEMPLATE])
def test_encode_prompt_is_the_text_of_render_prompt_with_one_bos(prompt, template):
    tokenizer = bytelevel_tokenizer(chat_template=template or BOS_TEMPLATE)
    if template is None and not isinstance(prompt, list) and prompt != CHAT:
        tokenizer.chat_template = None
    ids = encode_prompt(prompt, tokenizer)
    text = tokenizer.decode(ids)
    assert ids.count(tokenizer.bos_token_id) == 1
    assert text.removeprefix("<bos>") == render_prompt(prompt, tokenizer).removeprefix("<bos>")


def test_a_prompt_of_unknown_keys_is_refused():
    with pytest.raises(ValueError, match="question, x fits none: chat"):
        render_prompt({"question": "q", "x": 1}, bytelevel_tokenizer())


TEXT = st.text(min_size=0, max_size=20).filter(lambda text: not any("<" in c for c in text))
TOKENIZERS = {
    bos: bytelevel_tokenizer(bos=bos, chat_template=BOS_TEMPLATE) for bos in (True, False)
}


@settings(max_examples=60, deadline=None)
@given(
    prompt=TEXT,
    completion=TEXT.filter(str.strip),
    bos=st.booleans(),
    train_on=st.sampled_from(["completion", "all"]),
)
def test_any_row_begins_with_the_tokens_of_inference_and_loses_no_text(
    prompt, completion, bos, train_on
):
    tokenizer = TOKENIZERS[bos]
    fields = {"prompt": prompt, "completion": completion}
    row = encode(tokenizer, fields, train_on)
    start = encode_prompt(fields, tokenizer)
    assert row.input_ids[: row.prompt_len] == start
    assert whole(tokenizer, row) == "<bos>" * bos + prompt + completion + "<eos>"
    if train_on == "completion" and start:
        assert targets(tokenizer, row) == completion + "<eos>"


@settings(max_examples=40, deadline=None)
@given(
    contents=st.lists(TEXT.filter(str.strip), min_size=2, max_size=6).filter(
        lambda contents: len(contents) % 2 == 0
    )
)
def test_the_targets_of_any_chat_are_exactly_its_answers(contents):
    tokenizer = TOKENIZERS[True]
    turns = [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)
    ]
    row = encode(tokenizer, {"messages": turns}, "assistant")
    assert targets(tokenizer, row) == "".join(text + "<eos>" for text in contents[1::2])
    last = encode(tokenizer, {"messages": turns})
    assert targets(tokenizer, last) == contents[-1] + "<eos>"
    assert last.input_ids[: last.prompt_len] == encode_prompt(turns[:-1], tokenizer)
