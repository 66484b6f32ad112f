"""The 7 arithmetic and 8 commonsense test sets of LLM-Adapters, scored as its evaluation does.

Source: Hu et al., arXiv 2304.01933, and the scripts evaluate.py and commonsense_evaluate.py of
its repository: the prompt's words and spaces, beam search over 4 beams without sampling (their
temperature, top-p and top-k have no effect without it), 256 new tokens for arithmetic and 32 for
commonsense, and how an answer is found in what the model writes. A row is ``instruction``,
``input``, ``output``, ``answer``; the answer alone is compared.

Knows no torch: everything here is text.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from s2ft_ray.errors import ConfigError, DataError

NUM_BEAMS = 4
TOLERANCE = 1e-3
"""Of two numbers that count as equal."""
INDENT = " " * 16
"""The original's template is an indented literal, and its spaces are part of the prompt."""
_RESPONSE = "### Response:"
_BEGINNING = "Below is an instruction that describes a task"
_NUMBER = re.compile(r"-?\d+\.?\d*")


@dataclass(frozen=True)
class Task:
    """One test set."""

    name: str
    suite: Literal["arithmetic", "commonsense"]
    choices: str | None
    """A pattern whose first match is the answer; None: the last number is."""

    @property
    def max_new_tokens(self) -> int:
        return 256 if self.suite == "arithmetic" else 32

    def read_answer(self, value: object) -> str:
        """Return a row's answer as text; JSON's true is ``true``. ValueError where it can't be."""
        answer = str(value).lower() if isinstance(value, bool) else str(value)
        if self.choices is None:
            if not math.isfinite(float(answer)):
                raise ValueError(f"answer: {value!r} is no finite number")
        elif not re.fullmatch(self.choices, answer):
            choices = self.choices.replace("|", ", ")
            raise ValueError(f"answer: {value!r} is none of {choices}")
        return answer

    def find_answer(self, text: str) -> str:
        """Return the answer in what the model wrote; empty where there is none."""
        text = text.partition(_RESPONSE)[0].strip()
        if self.choices is None:
            numbers = _NUMBER.findall(text.replace(",", ""))
            return numbers[-1] if numbers else ""
        first = re.search(self.choices, text)
        return first.group() if first else ""

    def is_right(self, found: str, answer: str) -> bool:
        """Compare what `find_answer` returned with the row's answer."""
        if self.choices is not None:
            return found == answer
        value = float(found) if found else math.inf
        return abs(float(answer) - value) <= TOLERANCE


_ANSWERS = "answer1|answer2|answer3|answer4|answer5"
TASKS = {
    task.name: task
    for task in (
        *(Task(name, "arithmetic", None) for name in ("MultiArith", "gsm8k", "AddSub")),
        Task("AQuA", "arithmetic", "A|B|C|D|E"),
        *(Task(name, "arithmetic", None) for name in ("SingleEq", "SVAMP", "mawps")),
        Task("boolq", "commonsense", "true|false"),
        Task("piqa", "commonsense", "solution1|solution2"),
        Task("social_i_qa", "commonsense", _ANSWERS),
        Task("hellaswag", "commonsense", "ending1|ending2|ending3|ending4"),
        Task("winogrande", "commonsense", "option1|option2"),
        Task("ARC-Easy", "commonsense", _ANSWERS),
        Task("ARC-Challenge", "commonsense", _ANSWERS),
        Task("openbookqa", "commonsense", _ANSWERS),
    )
}
_OTHER_NAMES = {"siqa": "social_i_qa", "obqa": "openbookqa", "arce": "ARC-Easy"} | {
    "arcc": "ARC-Challenge"
}


@dataclass(frozen=True)
class TestRow:
    """A row of a test set."""

    task: Task
    number: int
    """In its file, from 0."""
    prompt: str
    answer: str


def find_task(path: Path) -> Task:
    """Tell the test set by its file: ``test_gsm8k.jsonl`` or ``AddSub/test.json``."""
    known = {_plain(name): name for name in TASKS} | _OTHER_NAMES
    stem = re.sub(r"(^|[-_.])test([-_.]|$)", "", path.stem)
    for name in (stem, path.absolute().parent.name):
        if _plain(name) in known:
            return TASKS[known[_plain(name)]]
    raise ConfigError(
        f"{path}: neither the file nor its folder is called like a test set of LLM-Adapters;"
        f" known: {', '.join(TASKS)}"
    )


def read_rows(path: Path) -> list[TestRow]:
    """Read a test set, JSON (a list) or JSONL. Raises DataError naming the row that isn't one."""
    task = find_task(path)
    rows = []
    for number, (place, fields) in enumerate(_read_objects(path)):
        try:
            instruction, answer = fields["instruction"], task.read_answer(fields["answer"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{place}: no row of {task.name}: {error!r}") from error
        rows.append(TestRow(task, number, render(instruction, fields.get("input")), answer))
    if not rows:
        raise DataError(f"{path}: holds no rows")
    return rows


def render(instruction: str, context: str | None = None) -> str:
    """Return the prompt, to the space: also what ``jobs/configs/paper`` trains on."""
    if context:
        request = (
            f"{_BEGINNING}, paired with an input that provides further context. Write a response"
            " that appropriately completes the request."
        )
        parts = [request, f"### Instruction:\n{INDENT}{instruction}"]
        parts.append(f"### Input:\n{INDENT}{context}")
    else:
        # The original has a space at the end of this line and of no other.
        request = f"{_BEGINNING}. Write a response that appropriately completes the request. "
        parts = [request, f"### Instruction:\n{INDENT}{instruction}"]
    return f"\n\n{INDENT}".join([*parts, f"{_RESPONSE}\n{INDENT}"])


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _read_objects(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            for index, fields in enumerate(json.loads(text)):
                yield f"{path}: row {index + 1}", fields
            return
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path}: no valid JSON: {error}") from error
    for line_number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield f"{path}:{line_number}", json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{line_number}: no valid JSON: {error}") from error
