"""One worker's part of a run: build, restore, train, save. torch.distributed, no Ray.

Every worker runs ``run_worker`` with the same run folder; rank 0 alone writes metrics and the
adapter. Invariant: an error of this package is raised on every worker at the same point, so that
no worker waits in a collective for one that has gone.
"""

import dataclasses
import logging
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from s2ft_ray.bases import load_base_model, load_tokenizer
from s2ft_ray.config import RunConfig
from s2ft_ray.data import MicroBatch, PreparedData, TrainLoader, eval_batches, num_steps
from s2ft_ray.errors import AdapterError, JobError, S2FTError
from s2ft_ray.method import Adapter, convert, convert_like, extract_adapter, slice_layers
from s2ft_ray.training.checkpoint import Checkpointer, TrainState
from s2ft_ray.training.evaluation import answer, evaluate
from s2ft_ray.training.loop import StepResult, train_step
from s2ft_ray.training.metrics import MetricsLog
from s2ft_ray.training.optimizer import build_optimizer
from s2ft_ray.training.parallel import Sharding, Workers, resolve_sharding, shard_model
from s2ft_ray.training.run_folder import RunFolder

logger = logging.getLogger(__name__)


def run_worker(path: Path, device: torch.device, num_threads: int) -> None:
    """Train the run at `path` to its end on this process, from its newest checkpoint.

    `num_threads` are the intra-op threads of a new run; a resumed run keeps its own, because
    another number rounds differently. The process group must exist.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # objects that NCCL carries go through the current device
    run = RunFolder(path)
    workers = Workers.join(device)
    with _raised_everywhere():
        torch.set_num_threads(_recorded_threads(run, num_threads))
        part = _build(run, workers)
    part.train()
    part.save_adapter()


@dataclass
class WorkerPart:
    """What one worker holds of a run."""

    run: RunFolder
    config: RunConfig
    workers: Workers
    data: PreparedData
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    loader: TrainLoader
    held_out: list[MicroBatch | None]

    def train(self) -> None:
        """Shard, restore the newest checkpoint, and step to the end of the run."""
        sharding, reason = self._choose_sharding()
        shard_model(self.model, self.workers, sharding)
        slices = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        state = TrainState(slices, build_optimizer(slices.values(), self.config.optim), self.loader)
        checkpointer = Checkpointer(
            self.run.checkpoints, keep=self.config.checkpoint.keep, workers=self.workers
        )
        if checkpointer.restore(state):
            for _, layer in slice_layers(self.model):
                layer.write_back()
        total = num_steps(self.config.optim, self.loader.num_rows)
        log = MetricsLog(self.run.metrics) if self.workers.rank == 0 else None
        if log:
            size = self.workers.world_size
            log.write("start", state.step, total_steps=total, world_size=size, sharding=sharding)
            logger.info("the base is in %s on %d workers: %s", sharding, size, reason)
        if state.step == 0:
            self._look(0, log)
        self._run_steps(state, total, checkpointer, log)

    def _run_steps(
        self, state: TrainState, total: int, checkpointer: Checkpointer, log: MetricsLog | None
    ) -> None:
        started, first = time.perf_counter(), state.step
        self.model.train()
        while state.step < total:
            try:
                result = train_step(
                    self.model,
                    state.optimizer,
                    self.loader.next_step(),
                    number=state.step,
                    num_steps=total,
                    config=self.config.optim,
                    workers=self.workers,
                )
            except JobError as error:
                good = checkpointer.newest_step()
                raise JobError(f"{error}; last good checkpoint: step {good}") from error
            state.step = result.step
            if log:
                pace = (time.perf_counter() - started) / (state.step - first)
                _log_step(log, result, time_left_s=pace * (total - state.step))
            if state.step % self.config.evaluation.every_steps == 0 or state.step == total:
                self._look(state.step, log)
            if state.step % self.config.checkpoint.every_steps == 0 or state.step == total:
                checkpointer.save(state)
        if log:
            log.write("end", total, train_seconds=time.perf_counter() - started)

    def save_adapter(self) -> None:
        """Export the adapter, check that every worker holds the same, write it on rank 0."""
        adapter = dataclasses.replace(extract_adapter(self.model), training=self._summary())
        prints = [""] * self.workers.world_size
        dist.all_gather_object(prints, adapter.fingerprint)
        if len(set(prints)) != 1:
            raise AdapterError(f"the workers hold different adapters: {', '.join(prints)}")
        with _raised_everywhere():
            if self.workers.rank == 0:
                adapter.save(self.run.adapter)
                loaded = Adapter.load(self.run.adapter).fingerprint
                if loaded != adapter.fingerprint:
                    raise AdapterError(f"{self.run.adapter}: reads back as another one ({loaded})")

    def _summary(self) -> dict[str, Any]:
        """Say how the adapter was trained, and how its prompts are to be rendered."""
        return {
            "run": self.run.run_id,
            "steps": num_steps(self.config.optim, self.loader.num_rows),
            "seed": self.config.seed,
            "data": {
                "format": self.data.report.format,
                "digest": self.data.report.digest,
                "chat_template": self.config.data.chat_template,
            },
            "optim": self.config.optim.model_dump(mode="json"),
        }

    def _look(self, step: int, log: MetricsLog | None) -> None:
        """Evaluate on the held-out rows and answer a few of their prompts."""
        result = evaluate(self.model, self.held_out, self.workers)
        prompts = self.data.eval_prompts[: self.config.evaluation.num_samples]
        length = self.config.evaluation.max_new_tokens
        answers = answer(
            self.model, self.tokenizer, prompts, max_new_tokens=length, workers=self.workers
        )
        samples = [
            {"prompt": prompt.prompt, "expected": prompt.expected, "answer": text}
            for prompt, text in zip(prompts, answers, strict=True)
        ]
        if log:
            log.write("eval", step, samples=samples, **dataclasses.asdict(result))

    def _choose_sharding(self) -> tuple[Sharding, str]:
        """Decide the sharding once for the run, and record what the workers are."""
        world = self.run.read_json("world.json")
        if world:
            return world["sharding"], "as in the run's first start"
        base_bytes = sum(p.numel() * p.element_size() for p in self.model.parameters())
        sharding, reason = resolve_sharding(self.config.parallel.sharding, base_bytes, self.workers)
        dist.barrier()  # everybody has looked for world.json before it appears
        if self.workers.rank == 0:
            on_gpu = self.workers.device.type == "cuda"
            world = {
                "world_size": self.workers.world_size,
                "num_threads": torch.get_num_threads(),
                "sharding": sharding,
                "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            }
            self.run.write_json("world.json", world)
        return sharding, reason


def _build(run: RunFolder, workers: Workers) -> WorkerPart:
    """Load the base, convert it (as the parent was, where there is one), and open the data."""
    config = run.load_config()
    data = PreparedData.load(run.data)
    tokenizer = load_tokenizer(config.model, config.data.chat_template)
    model = load_base_model(config.model)
    if run.parent.exists():
        convert_like(model, Adapter.load(run.parent))
    else:
        convert(model, config.method)
    if config.parallel.activation_checkpointing:
        model.activation_checkpointing_enable()
    pad_id, micro_batch_size = tokenizer.pad_token_id, config.optim.micro_batch_size
    loader = TrainLoader(
        data.train,
        global_batch_size=config.optim.global_batch_size,
        micro_batch_size=micro_batch_size,
        rank=workers.rank,
        world_size=workers.world_size,
        seed=config.seed,
        pad_id=pad_id,
        packing=config.data.max_seq_len if config.data.packing else None,
    )
    held_out = eval_batches(data.eval, micro_batch_size, workers.rank, workers.world_size, pad_id)
    return WorkerPart(
        run=run,
        config=config,
        workers=workers,
        data=data,
        tokenizer=tokenizer,
        model=model.to(workers.device),
        loader=loader,
        held_out=held_out,
    )


def _recorded_threads(run: RunFolder, num_threads: int) -> int:
    world = run.read_json("world.json")
    return int(world["num_threads"]) if world else num_threads


def _log_step(log: MetricsLog, result: StepResult, time_left_s: float) -> None:
    log.write(
        "train",
        result.step,
        loss=result.loss,
        lr=result.lr,
        grad_norm=result.grad_norm,
        tokens_per_s=result.num_tokens / result.seconds,
        step_seconds=result.seconds,
        num_targets=result.num_targets,
        memory_mib=_peak_memory_mib(),
        time_left_s=time_left_s,
    )


def _peak_memory_mib() -> float:
    """Peak memory of this worker: the GPU's where there is one, else the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


@contextmanager
def _raised_everywhere() -> Iterator[None]:
    """Make an S2FTError of one worker the error of all."""
    mine: S2FTError | None = None
    try:
        yield
    except S2FTError as error:
        mine = error
    errors: list[S2FTError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, mine)
    for found in errors:
        if found is not None:
            raise found
