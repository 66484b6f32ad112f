"""Small real runs for the distributed tests: a random-weight base, a data file, a run folder."""

import json
from pathlib import Path
from typing import Any

import torch

from s2ft_ray.config import parse_config
from s2ft_ray.data import prepare_data
from s2ft_ray.bases import load_tokenizer
from s2ft_ray.training.run_folder import RunFolder, create_run_folder


def write_rows(path: Path, count: int) -> Path:
    """Write `count` prompt/completion rows of unequal lengths."""
    rows = (
        {"prompt": f"Add {i} and {i % 7}:", "completion": f" {i + i % 7}" + "!" * (i % 5)}
        for i in range(count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_run(folder: Path, **sections: dict[str, Any]) -> RunFolder:
    """Create a run of s2ft://tiny as the driver does, with `sections` over the defaults."""
    document: dict[str, Any] = {
        "tenant": "acme",
        "name": "test",
        "data": {"train": str(write_rows(folder / "rows.jsonl", 60))},
        "method": {"budgets": {"o": 0.25, "down": 0.05}},
        "optim": {"lr": 1e-2, "max_steps": 6, "global_batch_size": 8, "micro_batch_size": 2},
        "parallel": {"sharding": "replicate"},
        "evaluation": {"every_steps": 100, "num_samples": 1, "max_new_tokens": 4},
        "checkpoint": {"storage_path": str(folder / "runs"), "every_steps": 100},
    }
    for name, values in sections.items():
        document[name] = {**document.get(name, {}), **values}
    config = parse_config(document)
    run = create_run_folder(config)
    tokenizer = load_tokenizer(config.model, config.data.chat_template)
    prepare_data(config.data, tokenizer, config.seed).save(run.data)
    return run


def run_on_cpu(path: Path) -> None:
    """What each process of a pool does: its part of the run."""
    from s2ft_ray.training.worker import run_worker

    run_worker(path, torch.device("cpu"), num_threads=1)
