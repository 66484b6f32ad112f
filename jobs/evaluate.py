"""Answer test rows with a base and with its registered adapter, side by side.

    python jobs/evaluate.py acme.support-bot@champion --data tickets_test.jsonl --show 3

A row is of any of the training formats; its answer is right if it equals the row's own, surrounding
space aside. Rows with a key ``skill`` are counted by it.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from s2ft_ray.bases import load_base_model, load_tokenizer
from s2ft_ray.config import ModelConfig
from s2ft_ray.data import encode_prompt
from s2ft_ray.errors import AdapterError, DataError, S2FTError
from s2ft_ray.method import Adapter
from s2ft_ray.registry import resolve_adapter


@dataclass
class TestRow:
    """A prompt with its right answer, and what the models answered."""

    group: str
    prompt: str
    input_ids: list[int]
    expected: str
    base: str = ""
    adapted: str = ""


def main(argv: list[str] | None = None) -> int:
    """Evaluate as the command line says; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "adapter", help="<tenant>.<name>[@alias | :version], or an adapter's folder"
    )
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="JSONL files of rows")
    parser.add_argument("--show", type=int, default=4, help="answers to print from the first file")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--json", type=Path, help="write every answer and the accuracies here")
    args = parser.parse_args(argv)
    try:
        name, adapter = load_adapter(args.adapter)
        rows = score(adapter, args.data, args.batch_size, args.max_new_tokens)
    except S2FTError as error:
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr)
        return error.exit_code
    print(f"{name}, fingerprint {adapter.fingerprint[:16]}, on {adapter.base.name}\n")
    for row in rows[: args.show]:
        print(f"prompt    {row.prompt}\nbase      {row.base}\nadapter   {row.adapted}\n")
    table = accuracies(rows)
    print_table(table)
    if args.json:
        answers = [vars(row) for row in rows]
        args.json.write_text(json.dumps({"accuracy": table, "rows": answers}, indent=2))
    return 0


def load_adapter(name: str) -> tuple[str, Adapter]:
    """Return the adapter of a folder or of a registered name, and what it is called."""
    if (Path(name) / "adapter_config.json").is_file():
        return name, Adapter.load(name)
    found = resolve_adapter(name)
    return f"{found.name} version {found.version}", Adapter.load(found.folder)


def score(adapter: Adapter, files: list[Path], batch_size: int, length: int) -> list[TestRow]:
    """Answer the rows of all `files` with the base, then with the adapter switched in."""
    if adapter.base.name is None:
        raise AdapterError("the adapter doesn't say the name of its base")
    config = ModelConfig(name_or_path=adapter.base.name, revision=adapter.base.revision)
    tokenizer = load_tokenizer(config, adapter.training.get("data", {}).get("chat_template"))
    model = load_base_model(config).to("cuda" if torch.cuda.is_available() else "cpu")
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


@torch.inference_mode()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[TestRow],
    field: str,
    batch_size: int,
    length: int,
) -> None:
    """Answer greedily in batches of prompts of like length, padded on the left."""
    pad, ordered = tokenizer.pad_token_id, sorted(rows, key=lambda row: len(row.input_ids))
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        longest = len(batch[-1].input_ids)
        ids = torch.tensor(
            [[pad] * (longest - len(row.input_ids)) + row.input_ids for row in batch],
            device=model.device,
        )
        mask = torch.tensor(
            [[0] * (longest - len(row.input_ids)) + [1] * len(row.input_ids) for row in batch],
            device=model.device,
        )
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=length,
            do_sample=False,
            pad_token_id=pad,
        )
        texts = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
        for row, text in zip(batch, texts, strict=True):
            setattr(row, field, text.strip())


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


if __name__ == "__main__":
    sys.exit(main())
