"""Base and adapter side by side on rows whose whole answer is compared."""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluation.adapters import load_adapter, load_base_of
from evaluation.generation import generate_batches
from s2ft_ray.data import encode_prompt
from s2ft_ray.errors import ConfigError, DataError
from s2ft_ray.method import Adapter

BATCH_SIZE, MAX_NEW_TOKENS = 64, 64


@dataclass
class TestRow:
    """A prompt with its right answer, and what the models answered."""

    group: str
    prompt: str
    input_ids: list[int]
    expected: str
    base: str = ""
    adapted: str = ""


def run(args: argparse.Namespace) -> None:
    """Answer with both, print some answers and the accuracies."""
    if args.adapter is None:
        raise ConfigError("adapter: is required; name a registered adapter or an adapter's folder")
    named = load_adapter(args.adapter)
    adapter = named.adapter
    rows = score(
        adapter,
        args.data,
        args.batch_size or BATCH_SIZE,
        args.max_new_tokens or MAX_NEW_TOKENS,
    )
    print(f"{named.title}, fingerprint {adapter.fingerprint[:16]}, on {adapter.base.name}\n")
    for row in rows[: args.show]:
        print(f"prompt    {row.prompt}\nbase      {row.base}\nadapter   {row.adapted}\n")
    table = accuracies(rows)
    print_table(table)
    if args.json:
        answers = [vars(row) for row in rows]
        args.json.write_text(json.dumps({"accuracy": table, "rows": answers}, indent=2))


def score(adapter: Adapter, files: list[Path], batch_size: int, length: int) -> list[TestRow]:
    """Answer the rows of all `files` with the base, then with the adapter switched in."""
    model, tokenizer = load_base_of(adapter)
    rows = [row for file in files for row in read_rows(file, tokenizer)]
    answer(model, tokenizer, rows, "base", batch_size, length)
    adapter.switch_into(model)
    answer(model, tokenizer, rows, "adapted", batch_size, length)
    return rows


def read_rows(file: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[TestRow]:
    """Read the rows of one file. Raises DataError naming the line that isn't one."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{file}: can't be read: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        try:
            fields = json.loads(line)
            prompt, expected = split_row(fields)
            yield TestRow(
                group=fields.get("skill", file.stem),
                prompt=prompt,
                input_ids=encode_prompt(fields, tokenizer),
                expected=expected.strip(),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{file}:{number}: no test row: {error!r}") from error


def split_row(fields: dict[str, Any]) -> tuple[str, str]:
    """Return what a person reads as the prompt, and the right answer."""
    if "messages" in fields:
        return fields["messages"][-2]["content"], fields["messages"][-1]["content"]
    if "prompt" in fields:
        return fields["prompt"], fields["completion"]
    return fields["instruction"], fields["output"]


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[TestRow],
    field: str,
    batch_size: int,
    length: int,
) -> None:
    """Answer greedily and put the answers into `field` of the rows."""
    prompts = [row.input_ids for row in rows]
    for batch in generate_batches(
        model, tokenizer, prompts, batch_size=batch_size, max_new_tokens=length
    ):
        for index, text in batch:
            setattr(rows[index], field, text.strip())


def accuracies(rows: list[TestRow]) -> dict[str, dict[str, float]]:
    """Return the share of right answers of base and adapter, by group in order of appearance."""
    groups: dict[str, list[TestRow]] = defaultdict(list)
    for row in rows:
        groups[row.group].append(row)
    return {
        name: {
            "rows": len(group),
            "base": sum(row.base == row.expected for row in group) / len(group),
            "adapter": sum(row.adapted == row.expected for row in group) / len(group),
        }
        for name, group in groups.items()
    }


def print_table(table: dict[str, dict[str, float]]) -> None:
    """Print the accuracies, one line a group."""
    width = max(map(len, table))
    print(f"{'exact answers':<{width}}  rows    base  adapter")
    for name, line in table.items():
        print(f"{name:<{width}}  {line['rows']:>4}  {line['base']:>6.1%}  {line['adapter']:>7.1%}")
