"""Every fault of a row: its line, its field and the way out."""

import re

import pytest
from data_parts import (
    FORGETFUL_TEMPLATE,
    PLAIN_TEMPLATE,
    bytelevel_tokenizer,
    data_config,
    instruction_row,
    write_rows,
)

from s2ft_ray.data import prepare_data
from s2ft_ray.errors import ConfigError, DataError

USER = {"role": "user", "content": "hello"}
ANSWER = {"role": "assistant", "content": "hi"}
GOOD = {
    "chat": {"messages": [USER, ANSWER]},
    "completion": {"prompt": "two and two", "completion": "four"},
    "instruction": {"instruction": "Add.", "input": "2 2", "output": "four"},
    "text": {"text": "once upon a time"},
}


def faults_of(tmp_path, rows, **changes) -> tuple[str, ...]:
    template = changes.pop("template", PLAIN_TEMPLATE)
    path = write_rows(tmp_path / "d.jsonl", rows)
    with pytest.raises(DataError) as caught:
        prepare_data(data_config(path, **changes), bytelevel_tokenizer(chat_template=template), 0)
    return tuple(fault.removeprefix(f"{tmp_path}/") for fault in caught.value.faults)


def chat(*turns) -> dict:
    return {"messages": list(turns)}


@pytest.mark.parametrize(
    ("row_format", "row", "told"),
    [
        ("completion", {"prompt": "p"}, "completion: is missing from this completion row (keys"),
        ("completion", {"completion": "c"}, "prompt: is missing from this completion row (key"),
        ("completion", {"prompt": 5, "completion": "c"}, "prompt: is the int 5; write text in"),
        ("completion", {"prompt": "p", "completion": ""}, "completion: is empty; write the text"),
        ("completion", {"prompt": "p", "completion": None}, "completion: is null; write text"),
        ("instruction", {"instruction": "Add.", "output": " \n"}, "output: is empty; write the"),
        ("instruction", {"instruction": "", "output": "4"}, "instruction: is empty; write the"),
        ("instruction", {"instruction": "Add.", "output": 4}, "output: is the int 4; write text"),
        (
            "instruction",
            {"instruction": "Add.", "input": ["2"], "output": "4"},
            "input: is a list; write text in quotes",
        ),
        ("instruction", {"text": "t"}, "instruction: is missing: this is a text row in a file of"),
        ("text", {"text": {"a": 1}}, "text: is an object; write text in quotes"),
        ("text", '{"text": "half \\ud83d"}', "text: holds half a character (\\ud83d, a lone"),
        ("text", {"completion": "c"}, "text: is missing from this text row (keys: completion)"),
        ("chat", {"messages": "hello"}, "messages: is text; write a list of turns"),
        ("chat", chat(), "messages: is empty; write at least a user's and an assistant's turn"),
        ("chat", chat("hello", ANSWER), "messages[0]: is text; write an object with role and"),
        ("chat", chat({"role": "user"}, ANSWER), "messages[0].content: is missing"),
        ("chat", chat(USER, {"content": "hi"}), "messages[1].role: is missing"),
        (
            "chat",
            chat({"role": "human", "content": "x"}, ANSWER),
            "messages[0].role: is 'human'; known roles are system, user, assistant",
        ),
        ("chat", chat(USER, ANSWER | {"content": ""}), "messages[1].content: is empty; write"),
        ("chat", chat(USER, ANSWER | {"content": ["hi"]}), "messages[1].content: is a list; wr"),
        (
            "chat",
            chat(USER, ANSWER | {"tool_calls": [{}]}),
            "messages[1].tool_calls: is not supported; a turn has role and content, leave the",
        ),
        ("chat", chat(USER, ANSWER | {"weight": 0}), "messages[1].weight: is not supported"),
        ("chat", chat(ANSWER, USER), "messages[0].role: is assistant where user must stand; af"),
        ("chat", chat(USER, USER, ANSWER), "messages[1].role: is user where assistant must"),
        ("chat", chat(USER, ANSWER, ANSWER), "messages[2].role: is assistant where user must"),
        ("chat", chat(USER, ANSWER, USER), "messages[2].role: the last turn is user's; end wi"),
        (
            "chat",
            chat(USER, {"role": "system", "content": "s"}, ANSWER),
            "messages[1].role: is system where assistant must stand",
        ),
        (
            "chat",
            chat({"role": "system", "content": "s"}),
            "messages[0].role: the last turn is system's; end with the assistant's turn",
        ),
        ("text", b'{"text": "\xff"}', "is no valid UTF-8 at byte 11 of the line (0xff); save the"),
        ("text", '{"text": "a", "text": "b"}', "text: the key stands twice in one object; keep"),
        ("text", '{"text": "a"', "is no valid JSON at column 13: Expecting ',' delimiter; write"),
    ],
)
def test_a_faulty_row_is_told_with_line_field_and_way_out(tmp_path, row_format, row, told):
    good = GOOD[row_format]
    fault, count = faults_of(tmp_path, [good, "", row, good, good])
    assert fault.startswith(f"d.jsonl:3: {told}")
    assert count == "1 row is faulty; mend it, or leave it out with data.invalid_rows: drop"


def test_each_fault_of_a_row_is_told(tmp_path):
    row = {"instruction": 1, "output": ""}
    first, second, count = faults_of(tmp_path, [GOOD["instruction"], row])
    assert first.startswith("d.jsonl:2: instruction: is the int 1")
    assert second.startswith("d.jsonl:2: output: is empty")
    assert count.startswith("1 row is faulty")


def test_a_row_of_another_format_is_told_with_the_files(tmp_path):
    fault, _ = faults_of(tmp_path, [GOOD["instruction"], GOOD["chat"]])
    assert fault == (
        "d.jsonl:2: instruction: is missing: this is a chat row in a file of instruction rows;"
        " put each format into a file of its own, or set data.format"
    )


def test_rows_that_fit_no_format_are_told_what_is_known(tmp_path):
    fault, _ = faults_of(tmp_path, [{"question": "q", "answer": "a"}])
    assert fault == (
        "d.jsonl:1: its keys (question, answer) fit no known format; known: chat (messages),"
        " completion (prompt, completion), instruction (instruction, output),"
        " preference (prompt, chosen, rejected), text (text);"
        " rename the keys"
    )


def test_a_row_whose_prompt_fills_max_seq_len_is_told(tmp_path):
    long = {"prompt": "word " * 50, "completion": "end"}
    fault, _ = faults_of(tmp_path, [GOOD["completion"], long], max_seq_len=40)
    assert re.fullmatch(
        r"d\.jsonl:2: completion: no target token is left: \d+ of the row's \d+ tokens are prompt,"
        r" and data\.max_seq_len is 40; raise it, or shorten the prompt",
        fault,
    )


def test_what_the_template_refuses_is_told(tmp_path):
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
        + PLAIN_TEMPLATE
    )
    row = chat({"role": "system", "content": "Be brief."}, USER, ANSWER)
    fault, _ = faults_of(tmp_path, [GOOD["chat"], row], template=template)
    assert fault == "d.jsonl:2: messages: the chat template refuses it: no system turns"


def test_a_template_that_rewrites_earlier_turns_is_told(tmp_path):
    row = chat(USER, ANSWER, USER, ANSWER)
    fault, _ = faults_of(
        tmp_path, [GOOD["chat"], row], template=FORGETFUL_TEMPLATE, train_on="assistant"
    )
    assert fault.startswith("d.jsonl:2: messages: the chat template writes the turns up to 1 other")
    assert fault.endswith("put {% generation %} markers into the template (data.chat_template)")


def test_twenty_faults_are_shown_and_all_are_counted(tmp_path):
    rows = [GOOD["text"]] + [{"text": ""}] * 2_500  # more than one batch
    *shown, count = faults_of(tmp_path, rows)
    assert [fault.split(":")[1] for fault in shown] == [str(line) for line in range(2, 22)]
    assert count == (
        "and 2480 more faults; 2500 rows are faulty;"
        " mend them, or leave them out with data.invalid_rows: drop"
    )


def test_the_faults_of_both_files_are_told_together(tmp_path):
    held_out = write_rows(tmp_path / "e.jsonl", [GOOD["text"], {"text": 1}])
    first, second, count = faults_of(tmp_path, [GOOD["text"], {"text": ""}], eval=held_out)
    assert first.startswith("d.jsonl:2: text: is empty")
    assert second.startswith("e.jsonl:2: text: is the int 1")
    assert count.startswith("2 rows are faulty")


def test_a_missing_file_is_told_together_with_the_rows(tmp_path):
    bad, missing, count = faults_of(tmp_path, [GOOD["text"], {"text": ""}], eval="no.jsonl")
    assert bad.startswith("d.jsonl:2: text: is empty")
    assert missing.startswith("data.eval: no.jsonl: no such file")
    assert count.startswith("1 row is faulty")


def test_the_eval_file_must_have_the_format_of_the_train_file(tmp_path):
    held_out = write_rows(tmp_path / "e.jsonl", [GOOD["text"]])
    fault, _ = faults_of(tmp_path, [GOOD["completion"]], eval=held_out)
    assert fault.startswith("e.jsonl:1: prompt: is missing: this is a text row in a file of compl")


def test_an_empty_file_is_refused(tmp_path):
    assert faults_of(tmp_path, []) == ("d.jsonl: is empty; it needs at least one row",)


def test_a_single_row_cant_be_split(tmp_path):
    assert faults_of(tmp_path, [GOOD["text"]]) == (
        "d.jsonl: has 1 row, and one must be held out for evaluation;"
        " add rows, or name a file of held-out rows in data.eval",
    )


def test_dropping_every_row_is_refused(tmp_path):
    first, second, end = faults_of(tmp_path, [{"text": ""}, {"text": 1}], invalid_rows="drop")
    assert first.startswith("d.jsonl:1: text: is empty")
    assert second.startswith("d.jsonl:2: text: is the int")
    assert end == "d.jsonl: all of its 2 rows are faulty; mend some of them"


def test_dropped_rows_are_counted_and_the_first_named(tmp_path):
    rows = [instruction_row(i) for i in range(60)]
    for line in range(3, 33):
        rows[line - 1]["output"] = ""
    path = write_rows(tmp_path / "d.jsonl", rows)
    data = prepare_data(data_config(path, invalid_rows="drop"), bytelevel_tokenizer(), 0)
    assert data.report.dropped == 30
    assert len(data.report.dropped_rows) == 20
    assert data.report.dropped_rows[0].startswith(f"{path}:3: output: is empty")
    lines = [*data.train["line"], *data.eval["line"]]
    assert sorted(lines) == [1, 2, *range(33, 61)]


def test_rows_that_cant_be_parsed_are_dropped_too(tmp_path):
    rows = [instruction_row(0), "{", b'{"\xff": 1}', "[]", instruction_row(1)]
    path = write_rows(tmp_path / "d.jsonl", rows)
    data = prepare_data(data_config(path, invalid_rows="drop"), bytelevel_tokenizer(), 0)
    assert sorted([*data.train["line"], *data.eval["line"]]) == [1, 5]
    assert data.report.dropped == 3


def test_chats_without_a_template_are_a_fault_of_the_config(tmp_path):
    path = write_rows(tmp_path / "d.jsonl", [GOOD["chat"]] * 2)
    with pytest.raises(ConfigError, match=r"^data\.chat_template: is needed: the rows are chats"):
        prepare_data(data_config(path), bytelevel_tokenizer(), 0)


def test_a_tokenizer_without_an_end_token_is_a_fault_of_the_config(tmp_path):
    path = write_rows(tmp_path / "d.jsonl", [GOOD["text"]] * 2)
    with pytest.raises(ConfigError, match=r"^model\.name_or_path: its tokenizer has no eos_token"):
        prepare_data(data_config(path), bytelevel_tokenizer(eos_token=None), 0)
