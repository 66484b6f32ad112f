"""Three loops over the same batches: one of one's own, the Hugging Face Trainer, and ours."""

import copy
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset as HFDataset
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from s2ft_ray.config import OptimConfig
from s2ft_ray.data import Step, TrainLoader
from s2ft_ray.method import Adapter, S2FTConfig, convert, extract_adapter
from s2ft_ray.training.loop import train_step
from s2ft_ray.training.optimizer import build_optimizer, learning_rate
from s2ft_ray.training.parallel import Layout, Workers, shard_model

STEPS, ROWS, MICRO, LENGTH = 6, 4, 2, 12
OPTIM = OptimConfig(
    lr=1e-2,
    warmup_steps=2,
    schedule="linear",
    max_grad_norm=0.5,
    max_steps=STEPS,
    global_batch_size=ROWS,
    micro_batch_size=MICRO,
)


def build_model(layout: str) -> Any:
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=44,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=61,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 if parameter.dim() == 1 else 5)
    budgets = {"q": 0.3, "v": 0.5, "o": 0.3, "up": 0.1, "down": 0.2}
    convert(model, S2FTConfig(budgets=budgets, layout=layout))
    return model


def all_steps() -> list[Step]:
    """Rows of one length, so that no loop has padding to look after."""
    rows = torch.randint(0, 61, (STEPS * ROWS, LENGTH), generator=torch.Generator().manual_seed(3))
    columns = {
        "input_ids": rows.tolist(),
        "target_mask": [[True] * LENGTH] * len(rows),
        "line": list(range(len(rows))),
    }
    loader = TrainLoader(
        HFDataset.from_dict(columns),
        global_batch_size=ROWS,
        micro_batch_size=MICRO,
        rank=0,
        world_size=1,
        seed=0,
        pad_id=0,
    )
    return [loader.next_step() for _ in range(STEPS)]


def all_rows() -> torch.Tensor:
    """Return what the steps hold, in their order."""
    return torch.cat([batch.input_ids for step in all_steps() for batch in step.micro_batches])


def train_plainly(model: Any) -> Adapter:
    """Accumulate, clip, step: what a researcher writes."""
    slices = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(slices, lr=OPTIM.lr, betas=OPTIM.betas, weight_decay=0.0)
    model.train()
    for step, rows in enumerate(all_rows().split(ROWS)):
        for micro in rows.split(MICRO):
            loss = model(input_ids=micro, labels=micro).loss
            (loss / (ROWS // MICRO)).backward()
        torch.nn.utils.clip_grad_norm_(slices, OPTIM.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(OPTIM, step, STEPS)
        optimizer.step()
        optimizer.zero_grad()
    return extract_adapter(model)


class _Rows(Dataset[dict[str, torch.Tensor]]):
    def __init__(self) -> None:
        self.rows = all_rows()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def train_by_trainer(model: Any) -> Adapter:
    """The Hugging Face Trainer, unmodified, with our schedule."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=STEPS,
            per_device_train_batch_size=MICRO,
            gradient_accumulation_steps=ROWS // MICRO,
            learning_rate=OPTIM.lr,
            adam_beta1=OPTIM.betas[0],
            adam_beta2=OPTIM.betas[1],
            max_grad_norm=OPTIM.max_grad_norm,
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        slices = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(slices, lr=OPTIM.lr, betas=OPTIM.betas, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate(OPTIM, step, STEPS) / OPTIM.lr
        )
        Trainer(model, arguments, train_dataset=_Rows(), optimizers=(optimizer, schedule)).train()
    return extract_adapter(model)


def train_by_our_loop(model: Any) -> Adapter:
    """`train_step` on a model under fully_shard, as a worker runs it."""
    workers = Workers.join(torch.device("cpu"))
    shard_model(model, workers, Layout.of("replicate", workers.world_size, 1))
    slices = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(slices, OPTIM)
    model.train()
    for number, step in enumerate(all_steps()):
        train_step(
            model,
            optimizer,
            step,
            number=number,
            num_steps=STEPS,
            config=OPTIM,
            workers=workers,
        )
    return extract_adapter(model)


def train_three_ways(layout: str) -> dict[str, Adapter]:
    assert dist.get_world_size() == 1
    plain = build_model(layout)
    models = [plain, copy.deepcopy(plain), copy.deepcopy(plain)]
    loops = {"plain": train_plainly, "Trainer": train_by_trainer, "ours": train_by_our_loop}
    return {name: loop(it) for (name, loop), it in zip(loops.items(), models, strict=True)}
