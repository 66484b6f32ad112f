"""A small pretrained base, a task that it does not know, and a run that teaches it.

Invariant: what is forgotten is measured on what the base itself says: texts sampled from it
before training, and KL(base || tuned) of the next token on them.

Dimensions: B rows, T tokens, V vocabulary.
"""

import copy
import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.contenders import NARROW, WIDE, lora_rank
from s2ft_ray.bases import load_base_model, load_tokenizer
from s2ft_ray.config import ModelConfig, S2FTConfig
from s2ft_ray.data import IGNORE_INDEX, MicroBatch, encode_prompt
from s2ft_ray.data.batches import Sample, build_micro_batch
from s2ft_ray.data.encoding import EncodedRow, Encoder
from s2ft_ray.errors import ConfigError
from s2ft_ray.method import base_fingerprint, convert, count_trainable

REPO = Path(__file__).parents[2]
TICKETS = REPO / "jobs" / "configs" / "data"
SHARED = REPO.parent / "shared"
# Shares of heads and channels: the bases are tiny, 3% of 8 heads would be less than one.
BUDGETS = {"o": 0.25, "down": 0.2}
BATCH_ROWS, WARMUP_STEPS, MAX_GRAD_NORM = 8, 5, 1.0
NUM_TESTED, NUM_SAMPLES = 64, 96
MAX_SEQ_LEN = 224  # half of the word problems are shorter
S2FT, LORA, NARROW_LORA, FULL = "S2FT o down", "LoRA q k v up down", "LoRA o down", "full"
LORA_TARGETS = {LORA: WIDE, NARROW_LORA: NARROW}
# About 3 apart, around each method's best.
LRS = dict.fromkeys((S2FT, LORA, NARROW_LORA), (1e-3, 3e-3, 1e-2)) | {FULL: (1e-4, 3e-4, 1e-3)}


@dataclass
class Task:
    """A base, the rows of the new task, and texts sampled from the base."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train: list[Sample]
    test: MicroBatch
    samples: MicroBatch
    """Targets are the tokens that the base chose."""
    base_logprobs: Tensor = field(init=False)
    """The base's, where the samples have targets: [N, V]."""

    def __post_init__(self) -> None:
        self.base_logprobs = _logprobs(self.model, self.samples)

    @cached_property
    def digest(self) -> str:
        """A sha256 of all that a run's figures depend on but its own settings."""
        train = [[list(row.input_ids), list(map(bool, row.target_mask))] for row in self.train]
        measured = [[it.input_ids.tolist(), it.labels.tolist()] for it in (self.test, self.samples)]
        recipe = [BATCH_ROWS, WARMUP_STEPS, MAX_GRAD_NORM, LORA_TARGETS]
        content = [base_fingerprint(self.model), train, measured, recipe]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @torch.no_grad()
    def measure(self, model: nn.Module) -> tuple[float, float]:
        """Return the loss on the new task's held-out rows and the KL from the base, per token."""
        model.eval()
        logits, targets = _at_targets(model, self.test)
        loss = F.cross_entropy(logits, targets)
        tuned = _logprobs(model, self.samples)
        kl = F.kl_div(tuned, self.base_logprobs, log_target=True, reduction="batchmean")
        model.train()
        return float(loss), max(0.0, float(kl))


def load_task(name: str) -> Task:
    """Load the base `name` with its task; ConfigError where its files are not there."""
    if name == "tiny":
        return _tickets()
    return _word_problems()


def available_tasks() -> list[str]:
    """Return the bases whose files are here."""
    present = (SHARED / "models" / "stories260k").is_dir() and (SHARED / "data" / "math").is_dir()
    return ["tiny", "stories260k"] if present else ["tiny"]


def teach(
    task: Task, method: str, lr: float, seed: int, measured: tuple[int, ...]
) -> Iterator[tuple[int, float, float]]:
    """Train a copy of the base; yield (step, loss on the new task, KL) at the `measured` steps."""
    torch.manual_seed(seed)
    model = _attach(method, copy.deepcopy(task.model), seed).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    rng = random.Random(seed)
    for step in range(1, measured[-1] + 1):
        rows = rng.sample(task.train, BATCH_ROWS)
        batch = build_micro_batch([[row] for row in rows], task.tokenizer.pad_token_id)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, step / WARMUP_STEPS)
        loss = F.cross_entropy(*_at_targets(model, batch))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        if step in measured:
            yield step, *task.measure(model)


def count_budget(task: Task) -> int:
    """Return how many parameters S2FT trains: the others' ranks are as near to it as they get."""
    return count_trainable(task.model.config, S2FTConfig(budgets=BUDGETS))


def _attach(method: str, model: PreTrainedModel, seed: int) -> nn.Module:
    if method == FULL:
        return model.requires_grad_(True)
    config = S2FTConfig(budgets=BUDGETS, seed=seed)
    size = count_trainable(model.config, config)
    model.requires_grad_(False)
    if method == S2FT:
        convert(model, config)
        return model
    targets = LORA_TARGETS[method]
    rank = lora_rank(model, size, targets, dora=False)
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))


def _at_targets(model: nn.Module, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Return the logits [N, V] that predict the batch's N targets, and the targets [N]."""
    targets = batch.labels[:, 1:]
    kept = targets != IGNORE_INDEX
    logits = model(**batch.model_inputs()).logits[:, :-1]
    return logits[kept].float(), targets[kept]


@torch.no_grad()
def _logprobs(model: nn.Module, batch: MicroBatch) -> Tensor:
    return F.log_softmax(_at_targets(model, batch)[0], dim=-1)


def _tickets() -> Task:
    """The embedded base learns to write tickets; its samples answer the questions it knows."""
    config = ModelConfig()
    tokenizer, model = load_tokenizer(config), load_base_model(config)
    rows = _read(TICKETS / "tickets_train.jsonl")
    train = [row for row in rows if row["messages"][-1]["content"].startswith("TICKET")]
    questions = _read(TICKETS / "base_skills_test.jsonl")
    step = len(questions) // NUM_SAMPLES
    prompts = [encode_prompt(row, tokenizer) for row in questions[::step][:NUM_SAMPLES]]
    return _build(
        "tiny", model, tokenizer, train, _read(TICKETS / "tickets_test.jsonl"), prompts, 24, "chat"
    )


def _word_problems() -> Task:
    """A model of children's stories learns to solve word problems; its samples are stories."""
    if "stories260k" not in available_tasks():
        raise ConfigError(f"stories260k: its model and data are not in {SHARED}; leave it out")
    config = ModelConfig(name_or_path=str(SHARED / "models" / "stories260k"))
    tokenizer, model = load_tokenizer(config), load_base_model(config)
    rows = [row for row in _read(SHARED / "data" / "math" / "train.jsonl") if row["output"].strip()]
    test = _read(SHARED / "data" / "math" / "test_addsub.jsonl")
    prompts = [[tokenizer.bos_token_id]] * NUM_SAMPLES
    return _build("stories260k", model, tokenizer, rows, test, prompts, 64, "instruction")


def _build(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: list[dict[str, Any]],
    test: list[dict[str, Any]],
    prompts: list[list[int]],
    length: int,
    row_format: Any,
) -> Task:
    encoder = Encoder(tokenizer, max_seq_len=MAX_SEQ_LEN, train_on="completion")
    kept = []
    for rows in (train, test):
        encoded = encoder.encode(rows, row_format)
        kept.append(
            [
                Sample(row.input_ids, row.target_mask, line)
                for line, row in enumerate(encoded)
                if isinstance(row, EncodedRow) and not row.is_truncated
            ]
        )
    pad = tokenizer.pad_token_id
    tested = build_micro_batch([[row] for row in kept[1][:NUM_TESTED]], pad)
    samples = [[row] for row in _sample(model, tokenizer, prompts, length)]
    return Task(name, model, tokenizer, kept[0], tested, build_micro_batch(samples, pad))


@torch.no_grad()
def _sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    length: int,
) -> Iterator[Sample]:
    """Let the base speak, at temperature 1 without cuts; its end token is a target too."""
    torch.manual_seed(0)
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    longest = max(map(len, prompts))
    output = model.generate(
        input_ids=torch.tensor([[pad] * (longest - len(p)) + p for p in prompts]),
        attention_mask=torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts]),
        max_new_tokens=length,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        pad_token_id=pad,
    )
    for line, (prompt, ids) in enumerate(zip(prompts, output[:, longest:].tolist(), strict=True)):
        spoken = ids[: ids.index(eos) + 1] if eos in ids else ids
        mask = [False] * len(prompt) + [True] * len(spoken)
        yield Sample([*prompt, *spoken], mask, line)


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
