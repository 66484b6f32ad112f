"""The five row formats: which one a row has, what must be in it, and the text it becomes.

    chat         {"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}, ...]}
    completion   {"prompt": ..., "completion": ...}
    instruction  {"instruction": ..., "input": ... (optional), "output": ...}
    preference   {"prompt": ..., "chosen": ..., "rejected": ...}, the prompt a text or turns
    text         {"text": ...}

Other keys of a row are ignored. A prompt is rendered here and nowhere else, for training and for
inference: ``render_prompt`` and ``encode_prompt``.

Invariant: the prompt of a rendered row is what ``render_prompt`` returns for it, and the row's
text begins with it.

Chat rows go through the tokenizer's chat template, and so do instruction rows where there is one
(one user turn, one assistant turn). Instruction rows without a template use the layout
``INSTRUCTION_LAYOUT``. Prompt/completion and text rows are taken literally, and preference rows
whose prompt is a text; a prompt of turns goes through the chat template, with the answer.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from transformers import PreTrainedTokenizerBase

Format = Literal["chat", "completion", "instruction", "preference", "text"]
Turn = dict[str, str]

REQUIRED_KEYS: dict[Format, tuple[str, ...]] = {
    "chat": ("messages",),
    "completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "preference": ("prompt", "chosen", "rejected"),
    "text": ("text",),
}
KNOWN_FORMATS = ", ".join(f"{name} ({', '.join(keys)})" for name, keys in REQUIRED_KEYS.items())
INSTRUCTION_LAYOUT = "### Instruction:\n{instruction}\n\n{input}### Response:\n"
INPUT_LAYOUT = "### Input:\n{input}\n\n"
MAY_BE_EMPTY = ("prompt", "input")
"""Text fields that may hold nothing; what is learned may not."""
MEANINGFUL_TURN_KEYS = ("tool_calls", "function_call", "weight")
"""Keys of a turn that other trainers obey: ignoring them would train on something else."""


def detect_format(fields: Mapping[str, Any]) -> Format | None:
    """Return the first format whose keys the row has."""
    for name, keys in REQUIRED_KEYS.items():
        if all(key in fields for key in keys):
            return name
    return None


def find_faults(fields: Mapping[str, Any], row_format: Format) -> list[str]:
    """Say what is wrong with a row: `field: what; way out` each, none for a good row."""
    missing = [key for key in REQUIRED_KEYS[row_format] if key not in fields]
    if missing:
        found = detect_format(fields)
        if found is not None:
            return [
                f"{missing[0]}: is missing: this is a {found} row in a file of {row_format} rows;"
                " put each format into a file of its own, or set data.format"
            ]
        keys = ", ".join(fields) or "none"
        return [f"{key}: is missing from this {row_format} row (keys: {keys})" for key in missing]
    if row_format == "chat":
        return _find_chat_faults(fields["messages"])
    faults: list[str] = []
    for key in REQUIRED_KEYS[row_format]:
        if row_format == "preference" and key == "prompt" and is_chat_prompt(fields):
            faults += _find_prompt_faults(fields["prompt"])
        else:
            faults += _find_text_faults(key, fields[key])
    if row_format == "preference" and not faults and fields["chosen"] == fields["rejected"]:
        faults.append("rejected: is the same as chosen; there is nothing to prefer")
    if row_format == "instruction" and fields.get("input") is not None:
        faults += _find_text_faults("input", fields["input"])
    return faults


def is_chat_prompt(fields: Mapping[str, Any]) -> bool:
    """Return whether a row's prompt is turns and not a text."""
    return isinstance(fields.get("prompt"), list)


def _find_prompt_faults(turns: list[Any]) -> list[str]:
    answered = [*turns, {"role": "assistant", "content": "the answer"}]
    return [f"prompt{fault.removeprefix('messages')}" for fault in _find_chat_faults(answered)]


def _find_text_faults(key: str, value: Any) -> list[str]:
    if not isinstance(value, str):
        return [f"{key}: is {_type_name(value)}; write text in quotes"]
    if not value.strip() and key not in MAY_BE_EMPTY:
        return [f"{key}: is empty; write the text that belongs here"]
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        return [f"{key}: holds half a character ({half}, a lone surrogate); write all of it"]
    return []


def _find_chat_faults(messages: Any) -> list[str]:
    if not isinstance(messages, list):
        return [f"messages: is {_type_name(messages)}; write a list of turns"]
    if not messages:
        return ["messages: is empty; write at least a user's and an assistant's turn"]
    faults: list[str] = []
    for index, turn in enumerate(messages):
        faults += [f"messages[{index}]{fault}" for fault in _find_turn_faults(turn)]
    return faults or _find_order_faults([turn["role"] for turn in messages])


def _find_turn_faults(turn: Any) -> list[str]:
    if not isinstance(turn, dict):
        return [f": is {_type_name(turn)}; write an object with role and content"]
    faults = [f".{key}: is missing" for key in ("role", "content") if key not in turn]
    faults += [
        f".{key}: is not supported; a turn has role and content, leave the rest out"
        for key in MEANINGFUL_TURN_KEYS
        if turn.get(key) is not None
    ]
    if "role" in turn and turn["role"] not in ("system", "user", "assistant"):
        faults.append(f".role: is {turn['role']!r}; known roles are system, user, assistant")
    if "content" in turn:
        content = turn["content"]
        if content != "" or turn.get("role") != "system":
            faults += [f".{fault}" for fault in _find_text_faults("content", content)]
    return faults


def _find_order_faults(roles: list[str]) -> list[str]:
    start = 1 if roles[0] == "system" else 0
    for index, role in enumerate(roles[start:], start):
        wanted = ("user", "assistant")[(index - start) % 2]
        if role != wanted:
            return [
                f"messages[{index}].role: is {role} where {wanted} must stand; after an optional"
                " system turn, user and assistant take turns"
            ]
    if roles[-1] != "assistant":
        return [
            f"messages[{len(roles) - 1}].role: the last turn is {roles[-1]}'s; end with the"
            " assistant's turn, which is what is learned"
        ]
    return []


def _type_name(value: Any) -> str:
    names = {type(None): "null", list: "a list", dict: "an object", str: "text"}
    return names.get(type(value), f"the {type(value).__name__} {value}")


def as_turns(
    fields: Mapping[str, Any], row_format: Format, tokenizer: PreTrainedTokenizerBase
) -> list[Turn] | None:
    """Return the row as turns for the chat template; None where the row is literal text."""
    if row_format == "chat":
        return [{"role": turn["role"], "content": turn["content"]} for turn in fields["messages"]]
    if row_format == "instruction" and tokenizer.chat_template is not None:
        instruction, context = fields["instruction"], fields.get("input") or ""
        content = f"{instruction}\n\n{context}" if context.strip() else instruction
        turns = [{"role": "user", "content": content}]
        if "output" in fields:
            turns.append({"role": "assistant", "content": fields["output"]})
        return turns
    return None


def as_text(fields: Mapping[str, Any], row_format: Format) -> tuple[str, str]:
    """Return a literal row as (prompt, completion); a text row is all completion."""
    if row_format == "completion":
        return fields["prompt"], fields.get("completion", "")
    if row_format == "instruction":
        context = fields.get("input") or ""
        block = INPUT_LAYOUT.format(input=context) if context.strip() else ""
        prompt = INSTRUCTION_LAYOUT.format(instruction=fields["instruction"], input=block)
        return prompt, fields.get("output", "")
    return "", fields["text"]


Prompt = str | Mapping[str, Any] | Sequence[Turn]
"""A literal prompt, a row of any format (its answer is left out), or the turns of a chat."""


def render_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text after which the model is to answer, as training rendered it.

    To get tokens use ``encode_prompt``: it knows who writes the BOS.
    """
    return _render_prompt(prompt, tokenizer)[0]


def encode_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens after which the model is to answer, as training encoded them."""
    text, is_chat = _render_prompt(prompt, tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = [] if is_chat else bos_ids(tokenizer)
    return cast(list[int], ids if ids[: len(bos)] == bos else bos + ids)


def _render_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> tuple[str, bool]:
    if isinstance(prompt, str):
        return prompt, False
    fields = prompt if isinstance(prompt, Mapping) else {"messages": list(prompt)}
    if is_chat_prompt(fields):
        fields = {"messages": fields["prompt"]}
    row_format = next((f for f, keys in REQUIRED_KEYS.items() if keys[0] in fields), None)
    if row_format is None:
        raise ValueError(f"a prompt with the keys {', '.join(fields)} fits none: {KNOWN_FORMATS}")
    turns = as_turns(fields, row_format, tokenizer)
    if turns is None:
        prompt_text, completion = as_text(fields, row_format)
        return completion if row_format == "text" else prompt_text, False
    if turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    return apply_template(turns, tokenizer, add_generation_prompt=True), True


def apply_template(
    turns: list[Turn], tokenizer: PreTrainedTokenizerBase, *, add_generation_prompt: bool = False
) -> str:
    """Render turns by the tokenizer's chat template, to text."""
    text = tokenizer.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    return cast(str, text)


def bos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what the tokenizer itself puts before a text: its BOS token, or nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][0] == bos else []
