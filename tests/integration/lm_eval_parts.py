"""lm_eval's own command against a service, on tasks of this file in place of those on the hub."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import yaml
from nodes import BIN

STOP = "\n\n"
CHOICES = [" blue", " 12", " the saw"]


def write_tasks(folder: Path, prompts: list[str], num_tokens: int) -> None:
    """Write ``continue``, which generates, and ``choose``, which scores `CHOICES`."""
    folder.mkdir()
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
    }
    generates = {
        "task": "continue",
        "output_type": "generate_until",
        "doc_to_target": "",
        "generation_kwargs": {"until": [STOP], "max_gen_toks": num_tokens, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    scores = {
        "task": "choose",
        "output_type": "multiple_choice",
        "doc_to_choice": CHOICES,
        "doc_to_target": 0,
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    for task in (generates, scores):
        path = folder / f"{task['task']}.yaml"
        path.write_text(yaml.safe_dump({**shared, **task}))


def run(
    folder: Path, key: str, kind: str, model_args: dict[str, str], tasks: list[str], *options: str
) -> dict[str, list[dict[str, Any]]]:
    """Ask a model of `kind` for tasks of `folder`; return the samples that it logs, by task."""
    output = folder / f"results-{kind}"
    command = [str(BIN / "lm_eval"), "run", "--model", kind, "--tasks", ",".join(tasks)]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in model_args.items())]
    command += ["--include_path", str(folder)]
    command += ["--output_path", str(output), "--log_samples", *options]
    env = {**os.environ, "OPENAI_API_KEY": key, "HF_HOME": str(folder / "hf")}
    env["HF_HUB_OFFLINE"] = "1"  # the tasks are here
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    samples = {}
    for task in tasks:
        (path,) = output.rglob(f"samples_{task}_*.jsonl")
        samples[task] = [json.loads(line) for line in path.read_text().splitlines()]
    return samples
