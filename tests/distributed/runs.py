"""Small real runs for the distributed tests: a random-weight base, a data file, a run folder."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from s2ft_ray.bases import load_tokenizer
from s2ft_ray.config import parse_config
from s2ft_ray.data import prepare_data
from s2ft_ray.training.run_folder import RunFolder, create_run_folder
from s2ft_ray.training.worker import run_worker


def save_base(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    kind: type[PretrainedConfig] = LlamaConfig,
    **config: Any,
) -> Path:
    """Save a random-weight model (a Llama with grouped-query attention) and a byte tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {
        "vocab_size": len(vocab),
        "hidden_size": 24,
        "intermediate_size": 37,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 4,
    }
    model = AutoModelForCausalLM.from_config(
        kind(pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes | config)
    )
    model.to(dtype).save_pretrained(folder)
    return folder


def write_rows(path: Path, count: int) -> Path:
    """Write `count` prompt/completion rows of unequal lengths."""
    rows = (
        {"prompt": f"Add {i} and {i % 7}:", "completion": f" {i + i % 7}" + "!" * (i % 5)}
        for i in range(count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_run(folder: Path, base: Path, **sections: dict[str, Any]) -> RunFolder:
    """Create a run as the driver does, with `sections` over small defaults."""
    folder.mkdir(exist_ok=True)
    document: dict[str, Any] = {
        "tenant": "acme",
        "name": "test",
        "model": {"name_or_path": str(base)},
        "data": {"train": str(write_rows(folder / "rows.jsonl", 60))},
        "method": {"budgets": {"o": 0.3, "v": 0.3, "down": 0.08, "up": 0.08}},
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


def train(path: Path, num_threads: int = 1) -> int:
    """What each process of a pool does: its part of the run. Returns the threads it took."""
    run_worker(path, torch.device("cpu"), num_threads)
    return torch.get_num_threads()


def read_metrics(run: RunFolder, kind: str) -> list[dict[str, Any]]:
    """Return the run's metrics of one kind."""
    lines = (json.loads(line) for line in run.metrics.read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]
