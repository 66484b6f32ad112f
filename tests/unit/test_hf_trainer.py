"""The Hugging Face Trainer, unmodified: as good as a loop of one's own, its checkpoints too."""

import copy
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from method_models import ALL, assert_same_state, build_model, snapshot, tokens
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from s2ft_ray.method import S2FTConfig, convert, extract_adapter, slice_layers

CONFIG = S2FTConfig(budgets=dict.fromkeys(ALL, 0.3))
STEPS, BATCH, MAX_NORM, LR = 6, 2, 0.5, 1e-2


class Rows(Dataset[dict[str, torch.Tensor]]):
    """STEPS batches of random tokens."""

    def __init__(self, size: int) -> None:
        self.rows = [tokens(seed, (12,)) for seed in range(size)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def build_trainer(model: Any, folder: Path, rows: Rows, **changes: Any) -> Trainer:
    values = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": LR,
        "lr_scheduler_type": "linear",
        "max_grad_norm": MAX_NORM,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return Trainer(model, TrainingArguments(**{**values, **changes}), train_dataset=rows)


def train_by_hand(model: Any, rows: Rows, accumulate: int = 1, autocast: bool = False) -> None:
    slices = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(slices, lr=LR, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    model.train()
    batches = iter(range(0, len(rows), BATCH))
    for _ in range(STEPS):
        micros = [next(batches) for _ in range(accumulate)]
        targets = sum((rows[i]["labels"][1:]).numel() for m in micros for i in range(m, m + BATCH))
        for first in micros:
            ids = torch.stack([rows[i]["input_ids"] for i in range(first, first + BATCH)])
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(ids, labels=ids, num_items_in_batch=torch.tensor(targets)).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(slices, MAX_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def test_the_trainer_equals_the_manual_loop_with_difference_zero(tmp_path: Path) -> None:
    by_trainer = build_model("qwen2")
    convert(by_trainer, CONFIG)
    by_hand = copy.deepcopy(by_trainer)
    base = snapshot(by_hand)
    rows = Rows(STEPS * BATCH)
    trainer = build_trainer(by_trainer, tmp_path, rows)
    trainer.train()
    assert trainer.optimizer.optimizer.defaults["fused"]  # its default, which bumps no version
    train_by_hand(by_hand, rows)
    assert any(not torch.equal(value, base[k]) for k, value in by_hand.state_dict().items())
    assert_same_state(by_trainer, snapshot(by_hand))
    assert extract_adapter(by_trainer).fingerprint == extract_adapter(by_hand).fingerprint


def test_with_accumulation_checkpointing_and_autocast_too(tmp_path: Path) -> None:
    by_trainer = build_model("llama")
    convert(by_trainer, CONFIG)
    by_hand = copy.deepcopy(by_trainer)
    rows = Rows(STEPS * BATCH * 2)
    build_trainer(
        by_trainer,
        tmp_path,
        rows,
        gradient_accumulation_steps=2,
        activation_checkpointing=True,
        bf16=True,
    ).train()
    train_by_hand(by_hand, rows, accumulate=2, autocast=True)
    assert_same_state(by_trainer, snapshot(by_hand))


class Interrupt(TrainerCallback):
    """Stops after the third step, as a killed run would."""

    def on_step_end(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            control.should_training_stop = True


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_its_checkpoints_are_plain_and_resume_to_the_uninterrupted_run(
    family: str, tmp_path: Path
) -> None:
    rows = Rows(STEPS * BATCH)
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole = build_model(family)
    base = snapshot(whole)
    convert(whole, CONFIG)
    build_trainer(whole, tmp_path / "whole", rows).train()

    stopped = build_model(family)
    convert(stopped, CONFIG)
    trainer = build_trainer(stopped, tmp_path / "run", rows, **saving)
    trainer.add_callback(Interrupt())
    trainer.train()
    saved = safetensors.torch.load_file(tmp_path / "run/checkpoint-3/model.safetensors")
    assert not [name for name in saved if "slice" in name or "indices" in name]
    plain = type(stopped).from_pretrained(tmp_path / "run/checkpoint-3")
    assert_same_state(plain, snapshot(stopped))

    resumed = build_model(family)
    convert(resumed, CONFIG)
    trainer = build_trainer(resumed, tmp_path / "run", rows, **saving)
    trainer.train(resume_from_checkpoint=True)
    assert_same_state(resumed, snapshot(whole))
    assert extract_adapter(resumed).fingerprint == extract_adapter(whole).fingerprint
    for name, layer in slice_layers(resumed):
        expected = base[f"{name}.weight"].index_select(layer.dim, layer.indices)
        assert torch.equal(layer.base_slice, expected)
