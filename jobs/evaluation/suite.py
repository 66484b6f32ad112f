"""The test sets of LLM-Adapters: answered in batches, scored, resumed, logged to MLflow."""

import argparse
import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluation.adapters import NamedAdapter, load_adapter, load_base, load_base_of
from evaluation.generation import generate_batches
from evaluation.llm_adapters import NUM_BEAMS, TASKS, Task, TestRow, read_rows
from evaluation.results import ResultsFile, ScoredRow
from s2ft_ray.bases import base_name
from s2ft_ray.config import ModelConfig
from s2ft_ray.errors import ConfigError
from s2ft_ray.registry import log_evaluation

BATCH_SIZE = 16


def run(args: argparse.Namespace) -> None:
    """Score what is not scored yet, print the table, log it."""
    if (args.adapter is None) == (args.base is None):
        raise ConfigError("name an adapter, or a base by --base; one of them")
    rows = _read_all(args.data)
    named = load_adapter(args.adapter) if args.adapter else None
    evaluation = describe(args, named)
    title = named.title if named else args.base
    path = args.results or Path(f"evaluation-{_file_name(args.adapter or args.base)}.jsonl")
    results = ResultsFile(path, evaluation)
    waiting = [row for row in rows if (row.task.name, row.number) not in results.rows]
    if waiting:
        model, tokenizer = (
            load_base_of(named.adapter) if named else load_base(ModelConfig(name_or_path=args.base))
        )
        if named:
            named.adapter.switch_into(model)
        answer(model, tokenizer, rows, waiting, results, args)
    accuracies = {name: results.accuracy(name) for name in _task_names(rows)}
    print(f"{title}: {len(results.rows):,} rows in {path}\n")
    print_table(accuracies, Counter(row.task.name for row in rows))
    if results.mlflow_run is None:
        results.set_mlflow_run(_log(title, named, evaluation, accuracies, path))
    print(f"\nlogged to the MLflow run {results.mlflow_run}")


def describe(args: argparse.Namespace, named: NamedAdapter | None) -> dict[str, Any]:
    """Return what the scores depend on: two runs that agree in it may share a results file."""
    return {
        "base": named.adapter.base.name if named else base_name(args.base),
        "adapter": named.adapter.fingerprint if named else None,
        "num_beams": args.num_beams or NUM_BEAMS,
        "max_new_tokens": args.max_new_tokens,
        "files": sorted(hashlib.sha256(file.read_bytes()).hexdigest() for file in args.data),
    }


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[TestRow],
    waiting: list[TestRow],
    results: ResultsFile,
    args: argparse.Namespace,
) -> None:
    """Answer and score the waiting rows, batch by batch; the bar counts those done before."""
    with tqdm(total=len(rows), initial=len(rows) - len(waiting), unit="row") as bar:
        for name in _task_names(waiting):
            task = TASKS[name]
            of_task = [row for row in waiting if row.task is task]
            bar.set_description(name)
            for batch in generate_batches(
                model,
                tokenizer,
                [tokenizer(row.prompt)["input_ids"] for row in of_task],
                batch_size=args.batch_size or BATCH_SIZE,
                max_new_tokens=args.max_new_tokens or task.max_new_tokens,
                num_beams=args.num_beams or NUM_BEAMS,
            ):
                results.add(score(task, of_task[index], text) for index, text in batch)
                bar.update(len(batch))
                bar.set_postfix(accuracy=f"{results.accuracy(name):.3f}")


def score(task: Task, row: TestRow, written: str) -> ScoredRow:
    """Find the answer in what the model wrote and compare it."""
    found = task.find_answer(written)
    is_right = task.is_right(found, row.answer)
    return ScoredRow(task.name, row.number, written, found, row.answer, is_right)


def print_table(accuracies: dict[str, float], counts: Counter[str]) -> None:
    """Print the accuracies, one line a test set, and the mean over the test sets of each suite."""
    width = max(map(len, [*accuracies, "mean of arithmetic"]))
    print(f"{'accuracy':<{width}}   rows")
    for name, value in accuracies.items():
        print(f"{name:<{width}}  {counts[name]:>5}  {value:>6.1%}")
    for name, value in means(accuracies).items():
        print(f"{f'mean of {name}':<{width}}  {'':>5}  {value:>6.1%}")


def means(accuracies: dict[str, float]) -> dict[str, float]:
    """Return each suite's mean over its test sets, as the papers report it."""
    suites: dict[str, list[float]] = {}
    for name, value in accuracies.items():
        suites.setdefault(TASKS[name].suite, []).append(value)
    return {suite: sum(values) / len(values) for suite, values in suites.items()}


def _log(
    title: str,
    named: NamedAdapter | None,
    evaluation: dict[str, Any],
    accuracies: dict[str, float],
    path: Path,
) -> str:
    metrics = {f"accuracy/{name}": value for name, value in accuracies.items()}
    metrics |= {f"accuracy/mean_{suite}": value for suite, value in means(accuracies).items()}
    tags = {"base": evaluation["base"]}
    tenant = "evaluation"
    if named:
        tags["fingerprint"] = named.adapter.fingerprint
    if named and named.registered:
        tags["model"] = named.registered
        tenant = named.registered.partition(".")[0]
    return log_evaluation(
        f"llm-adapters: {title}",
        metrics,
        experiment=f"s2ft/{tenant}",
        params={key: str(evaluation[key]) for key in ("num_beams", "max_new_tokens")},
        tags=tags,
        files=[path],
    )


def _read_all(files: list[Path]) -> list[TestRow]:
    rows: list[TestRow] = []
    seen: dict[str, Path] = {}
    for file in files:
        found = read_rows(file)
        name = found[0].task.name
        if name in seen:
            raise ConfigError(f"{file}: is a second file of {name}, after {seen[name]}; keep one")
        seen[name] = file
        rows += found
    return rows


def _task_names(rows: list[TestRow]) -> list[str]:
    return list(dict.fromkeys(row.task.name for row in rows))


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in ".-" else "-" for letter in name)
