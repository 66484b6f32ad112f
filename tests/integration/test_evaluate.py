"""A run of the paper on a small model, and its adapter on LLM-Adapters' test sets: a real Ray, a
real MLflow, an interrupted evaluation."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from nodes import Node

from s2ft_ray.bases import load_base_model, load_tokenizer
from s2ft_ray.config import ModelConfig
from s2ft_ray.method import Adapter
from s2ft_ray.registry import resolve_adapter

REPO = Path(__file__).parents[2]
SHARED = REPO.parent / "shared"
STORIES, MATH = SHARED / "models" / "stories260k", SHARED / "data" / "math"
ADAPTER = "paper.llama2-7b-arithmetic"
LENGTH, BEAMS, ROWS = 12, 4, 3
TASKS = ("AQuA", "AddSub", "boolq", "gsm8k")
CHOICES = "Answer Choices: (A) 21 (B) 21.5 (C) 22 (D) 22.5 (E) 23"
SMALLER = {
    "model.name_or_path": STORIES,
    "model.dtype": "float32",
    "data.max_seq_len": 512,
    "optim.epochs": "null",
    "optim.max_steps": 3,
    "optim.warmup_steps": 1,
    "optim.global_batch_size": 4,
    "optim.micro_batch_size": 4,
    "parallel.use_gpu": "false",
    "parallel.resources_per_worker": "{CPU: 1}",
    "evaluation.num_samples": 0,
}

pytestmark = pytest.mark.skipif(not STORIES.is_dir(), reason=f"{STORIES} is not here")


def head_of(name: str, count: int, folder: Path) -> Path:
    path = folder / name
    path.write_text("".join(f"{line}\n" for line in (MATH / name).read_text().split("\n")[:count]))
    return path


def chosen(name: str, answers: list[str], question: str, folder: Path) -> Path:
    """Write a test set of choices as LLM-Adapters has it: a JSON array in a folder of its name."""
    (folder / name).mkdir(exist_ok=True)
    rows = [
        {
            "instruction": f"{question.format(number)}",
            "input": "",
            "output": f"the correct answer is {answer}",
            "answer": answer,
        }
        for number, answer in enumerate(answers)
    ]
    path = folder / name / "test.json"
    path.write_text(json.dumps(rows))
    return path


def job(node: Node, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**node.env, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command],
        cwd=REPO,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )


def evaluate(node: Node, results: Path) -> subprocess.CompletedProcess[str]:
    folder = results.parent
    files = [head_of(f"test_{name}.jsonl", ROWS, folder) for name in ("addsub", "gsm8k")]
    question = "Please answer the following question with true or false, question: is {} even?"
    files.append(chosen("boolq", ["true", "false", "true"], question, folder))
    question = f"A man walks {{}} miles and then 21 more. How far? {CHOICES}"
    files.append(chosen("AQuA", ["A", "C", "E"], question, folder))
    options = ["--suite", "llm-adapters", "--results", str(results), "--batch-size", "2"]
    options += ["--max-new-tokens", str(LENGTH), "--data", *map(str, files)]
    return job(node, "jobs/evaluate.py", ADAPTER, *options)


@pytest.fixture(scope="module")
def results(node: Node, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scored rows of the adapter that the paper's run made."""
    folder = tmp_path_factory.mktemp("paper")
    values = {**SMALLER, "data.train": head_of("train.jsonl", 40, folder)}
    overrides = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    config = f"jobs/configs/paper/{ADAPTER.partition('.')[2]}.yaml"
    trained = job(node, "jobs/finetune.py", "--config", config, *overrides)
    assert trained.returncode == 0, trained.stderr
    ended = evaluate(node, folder / "results.jsonl")
    assert ended.returncode == 0, ended.stderr
    assert f"{len(TASKS) * ROWS} rows in" in ended.stdout
    return folder / "results.jsonl"


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_row_is_scored_and_the_scores_are_logged(node: Node, results: Path) -> None:
    _, *rows, last = lines_of(results)
    assert sorted((row["task"], row["number"]) for row in rows) == [
        (task, number) for task in TASKS for number in range(ROWS)
    ]
    client = MlflowClient(node.env["MLFLOW_TRACKING_URI"])
    run = client.get_run(last["mlflow_run"])
    assert run.info.status == "FINISHED"
    assert client.get_experiment(run.info.experiment_id).name == "s2ft/paper"
    assert run.data.tags["model"] == f"{ADAPTER}:1"
    shares = {
        task: sum(row["is_right"] for row in rows if row["task"] == task) / ROWS for task in TASKS
    }
    arithmetic = [share for task, share in shares.items() if task != "boolq"]
    assert run.data.metrics == {
        **{f"accuracy/{task}": share for task, share in shares.items()},
        "accuracy/mean_arithmetic": pytest.approx(sum(arithmetic) / 3),
        "accuracy/mean_commonsense": shares["boolq"],
    }


def test_interrupted_evaluation_goes_on(node: Node, results: Path, tmp_path: Path) -> None:
    whole = lines_of(results)
    torn = tmp_path / "torn.jsonl"
    kept = "".join(json.dumps(line) + "\n" for line in whole[:4])
    torn.write_text(kept + json.dumps(whole[4])[:20])
    ended = evaluate(node, torn)
    assert ended.returncode == 0, ended.stderr
    assert "3/12" in ended.stderr  # the bar begins where the first one ended

    def in_order(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return sorted(lines[1:-1], key=lambda row: (row["task"], row["number"]))

    assert in_order(lines_of(torn)) == in_order(whole)
    assert torn.read_text().startswith(kept)


def test_batches_answer_as_one_prompt_at_a_time_does(node: Node, results: Path) -> None:
    config = ModelConfig(name_or_path=str(STORIES))
    model, tokenizer = load_base_model(config), load_tokenizer(config)
    uri = node.env["MLFLOW_TRACKING_URI"]
    Adapter.load(resolve_adapter(ADAPTER, uri).folder).switch_into(model)
    written = {(row["task"], row["number"]): row["written"] for row in lines_of(results)[1:-1]}
    indent = " " * 16
    for number, line in enumerate((MATH / "test_addsub.jsonl").read_text().split("\n")[:ROWS]):
        prompt = (
            "Below is an instruction that describes a task. Write a response that appropriately"
            f" completes the request. \n\n{indent}### Instruction:\n{indent}"
            f"{json.loads(line)['instruction']}\n\n{indent}### Response:\n{indent}"
        )
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=LENGTH,
            num_beams=BEAMS,
            do_sample=False,
        )
        alone = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        assert written["AddSub", number] == alone
