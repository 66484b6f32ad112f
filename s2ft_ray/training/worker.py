"""One worker's part of a run: build, restore, train, save. torch.distributed, no Ray.

Every worker runs ``run_worker`` with the same run folder; rank 0 alone writes metrics and the
adapter. Invariant: an error of this package is raised on every worker at the same point, so that
no worker waits in a collective for one that has gone.
"""

import dataclasses
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from s2ft_ray.bases import load_model_config, load_tokenizer
from s2ft_ray.config import RunConfig
from s2ft_ray.data import (
    MicroBatch,
    PreparedData,
    TrainLoader,
    eval_batches,
    num_steps,
)
from s2ft_ray.errors import AdapterError, CheckpointError, Diverged, Preempted
from s2ft_ray.method import (
    Adapter,
    count_trainable,
    extract_adapter,
    slice_layers,
    write_back,
)
from s2ft_ray.training.checkpoint import Checkpointer, TrainState
from s2ft_ray.training.collectives import CollectiveClock
from s2ft_ray.training.conversion import load_converted
from s2ft_ray.training.evaluation import answer, evaluate
from s2ft_ray.training.faults import raised_everywhere
from s2ft_ray.training.layout import resolve_layout
from s2ft_ray.training.loop import train_step
from s2ft_ray.training.memory import estimate_memory, measure_base
from s2ft_ray.training.metrics import MetricsLog
from s2ft_ray.training.objective import CrossEntropy, EmbeddingNoise, Objective, Preference
from s2ft_ray.training.optimizer import build_optimizer
from s2ft_ray.training.parallel import Layout, Workers, shard_model
from s2ft_ray.training.run_folder import RunFolder
from s2ft_ray.training.speed import RunSpeed, StepProfiler

logger = logging.getLogger(__name__)


def run_worker(
    path: Path,
    device: torch.device,
    num_threads: int,
    is_draining: Callable[[], bool] = lambda: False,
    node_id: str = "",
) -> None:
    """Train the run at `path` to its end on this process, from its newest checkpoint.

    `num_threads` are the intra-op threads of a new run; a resumed run keeps its own, because
    another number rounds differently. `is_draining` tells whether this worker knows of a node of
    the group that will be taken away: all then stop, as when asked to. `node_id` names this
    worker's node; the metrics tell which of them the workers are on. The process group must exist.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # objects that NCCL carries go through the current device
    run = RunFolder(path)
    workers = Workers.join(device)
    with raised_everywhere():
        run.check_reachable()
        torch.set_num_threads(_recorded_threads(run, num_threads))
        log = MetricsLog(run.metrics) if workers.rank == 0 else None
    nodes = workers.count_by_node(node_id)
    if log:
        log.write("workers", 0, nodes=nodes)
    part = _build(run, workers)
    part.is_draining, part.log = is_draining, log
    part.train()
    part.save_adapter()


@dataclass
class WorkerPart:
    """What one worker holds of a run."""

    run: RunFolder
    config: RunConfig
    workers: Workers
    layout: Layout
    data: PreparedData
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    loader: TrainLoader
    held_out: list[MicroBatch | None]
    objective: Objective = CrossEntropy()  # noqa: RUF009 - frozen
    noise: EmbeddingNoise | None = None
    is_draining: Callable[[], bool] = lambda: False
    log: MetricsLog | None = None
    """Rank 0 has it."""
    chosen_step: int = 0
    """After training: the step whose slices the model holds."""

    def train(self) -> None:
        """Shard, restore the newest checkpoint, and step to the end of the run."""
        objective, seed = self.config.objective, self.config.seed
        if objective.neftune_alpha:
            self.noise = EmbeddingNoise(self.model, objective.neftune_alpha, seed)
        shard_model(self.model, self.workers, self.layout)
        if objective.loss == "dpo":  # before the checkpoint: the run's start is the reference
            self.objective = Preference(self.model, objective.dpo_beta)
        else:
            self.objective = CrossEntropy(objective.label_smoothing)
        slices = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        state = TrainState(slices, build_optimizer(slices.values(), self.config.optim), self.loader)
        selects_best = self.config.checkpoint.select == "best"
        # For dropout: each worker draws its own, the same in every run. A checkpoint has its state.
        torch.manual_seed((seed * 1_000_003 + self.workers.rank) % 2**63)
        checkpointer = Checkpointer(
            self.run.checkpoints,
            keep=self.config.checkpoint.keep,
            keep_best=selects_best,
            workers=self.workers,
        )
        with checkpointer:
            self._go_on(state, checkpointer)
            self.chosen_step = state.step
            if selects_best and checkpointer.restore_slices(state, state.standing.step):
                self._write_back()
                self.chosen_step = state.standing.step

    def _go_on(self, state: TrainState, checkpointer: Checkpointer) -> None:
        if checkpointer.restore(state):
            self._write_back()
        total = num_steps(self.config.optim, self.loader.num_rows)
        if self.log:
            size = self.workers.world_size
            self.log.write(
                "start",
                state.step,
                total_steps=total,
                world_size=size,
                sharding=self.layout.sharding,
            )
        if state.step == 0:
            self._look(0)
        self._run_steps(state, total, checkpointer)

    def _write_back(self) -> None:
        write_back(layer for _, layer in slice_layers(self.model))

    def _run_steps(self, state: TrainState, total: int, checkpointer: Checkpointer) -> None:
        started, first = time.perf_counter(), state.step
        speed = RunSpeed(self.model, self.workers.device, self.workers.world_size)
        collectives = CollectiveClock(self.model, self.workers.device, self.layout)
        held_up = 0.0  # by the last checkpoint
        profiler = None
        if self.config.tracking.profile:
            profiler = StepProfiler(self.run.profile, self.workers.rank)
        self.model.train()
        while state.step < total and not self._has_lost_patience(state):
            if profiler:
                profiler.begin_step()
            began = time.perf_counter()
            step = self.loader.next_step()
            data_seconds = time.perf_counter() - began
            try:
                with collectives.counting():
                    result = train_step(
                        self.model,
                        state.optimizer,
                        step,
                        number=state.step,
                        num_steps=total,
                        config=self.config.optim,
                        workers=self.workers,
                        is_stop_requested=self._is_stop_requested,
                        objective=self.objective,
                        noise=self.noise,
                    )
            except Diverged as error:
                checkpointer.settle()
                good = checkpointer.newest_step()
                raise Diverged(f"{error}; last good checkpoint: step {good}") from error
            state.step = result.step
            communication = collectives.seconds() + result.phases["agree"]
            if self.log:
                pace = (time.perf_counter() - started) / (state.step - first)
                phases = {"data": data_seconds, "checkpoint": held_up, **result.phases}
                utilisation = speed.add(result.num_tokens, phases, communication)
                self.log.write_step(
                    result,
                    {**phases, "communication": communication},
                    utilisation,
                    time_left_s=pace * (total - state.step),
                )
                held_up = 0.0
            is_best = False
            if state.step % self.config.evaluation.every_steps == 0 or state.step == total:
                loss = self._look(state.step)
                is_best = state.standing.add(loss, state.step) and checkpointer.keep_best
            ends = state.step == total or self._has_lost_patience(state)
            is_due = state.step % self.config.checkpoint.every_steps == 0
            if is_due or is_best or ends or result.is_stop_requested:
                began = time.perf_counter()
                checkpointer.save(state)
                held_up = time.perf_counter() - began
            if result.is_stop_requested and not ends:
                checkpointer.settle()
                if self.log:
                    self.log.write("stop", state.step)
                raise Preempted(state.step)
        began = time.perf_counter()
        checkpointer.settle()
        speed.hold_up(held_up + time.perf_counter() - began)
        if profiler:
            profiler.end()
        if self.log:
            seconds = time.perf_counter() - started
            self.log.write("end", state.step, train_seconds=seconds, **speed.summary())

    def _has_lost_patience(self, state: TrainState) -> bool:
        patience = self.config.evaluation.patience
        return patience is not None and state.standing.num_worse >= patience

    def _is_stop_requested(self) -> bool:
        asked = self.workers.rank == 0 and self.run.is_stop_requested()
        return asked or self.is_draining()

    def save_adapter(self) -> None:
        """Export the adapter, check that every worker holds the same, write it on rank 0."""
        adapter = dataclasses.replace(extract_adapter(self.model), training=self._summary())
        prints = [""] * self.workers.world_size
        dist.all_gather_object(prints, adapter.fingerprint)
        if len(set(prints)) != 1:
            raise AdapterError(f"the workers hold different adapters: {', '.join(prints)}")
        with raised_everywhere():
            if self.workers.rank == 0:
                try:
                    if not self.run.is_trained:  # what a killed worker has left
                        shutil.rmtree(self.run.adapter, ignore_errors=True)
                    adapter.save(self.run.adapter)
                except OSError as error:
                    raise CheckpointError(
                        f"{self.run.adapter}: {error.strerror or error}; make room there;"
                        " --resume writes it from the last checkpoint"
                    ) from error
                try:
                    loaded = Adapter.load(self.run.adapter).fingerprint
                    if loaded != adapter.fingerprint:
                        raise AdapterError(
                            f"{self.run.adapter}: reads back as another one ({loaded})"
                        )
                except AdapterError:
                    shutil.rmtree(self.run.adapter)  # for the next start to write it anew
                    raise

    def _summary(self) -> dict[str, Any]:
        """Say how the adapter was trained, and how its prompts are to be rendered."""
        return {
            "run": self.run.run_id,
            "steps": self.chosen_step,
            "seed": self.config.seed,
            "data": {
                "format": self.data.report.format,
                "digest": self.data.report.digest,
                "chat_template": self.config.data.chat_template,
            },
            "optim": self.config.optim.model_dump(mode="json"),
        }

    def _look(self, step: int) -> float:
        """Evaluate on the held-out rows, answer a few of their prompts; return the loss."""
        objective = self.objective if isinstance(self.objective, Preference) else CrossEntropy()
        result = evaluate(self.model, self.held_out, self.workers, objective)
        prompts = self.data.eval_prompts[: self.config.evaluation.num_samples]
        length = self.config.evaluation.max_new_tokens
        answers = answer(
            self.model, self.tokenizer, prompts, max_new_tokens=length, workers=self.workers
        )
        samples = [
            {"prompt": prompt.prompt, "expected": prompt.expected, "answer": text}
            for prompt, text in zip(prompts, answers, strict=True)
        ]
        if self.log:
            self.log.write("eval", step, samples=samples, **dataclasses.asdict(result))
        return result.loss


def _build(run: RunFolder, workers: Workers) -> WorkerPart:
    """Load the base, convert it (as the parent was, where there is one), and open the data."""
    with raised_everywhere():
        config = run.load_config()
        data = PreparedData.load(run.data)
        tokenizer = load_tokenizer(config.model, config.data.chat_template)
    layout = _choose_layout(run, config, data, workers)
    model = load_converted(run, config, data, tokenizer, workers, layout)
    if config.parallel.activation_checkpointing:
        model.activation_checkpointing_enable()
    pad_id, micro_batch_size = tokenizer.pad_token_id, config.optim.micro_batch_size
    rank, world_size = workers.rank, workers.world_size
    with raised_everywhere():
        loader = TrainLoader(
            data.train,
            global_batch_size=config.optim.global_batch_size,
            micro_batch_size=micro_batch_size,
            rank=rank,
            world_size=world_size,
            seed=config.seed,
            pad_id=pad_id,
            packing=config.data.max_seq_len if config.data.packing else None,
            groups=data.groups,
            shuffle_buffer=config.data.shuffle_buffer,
        )
        held_out = eval_batches(data.eval, micro_batch_size, rank, world_size, pad_id)
    return WorkerPart(
        run=run,
        config=config,
        workers=workers,
        layout=layout,
        data=data,
        tokenizer=tokenizer,
        model=model,  # where it is sharded, fully_shard moves each worker's part to its device
        loader=loader,
        held_out=held_out,
    )


def _choose_layout(
    run: RunFolder, config: RunConfig, data: PreparedData, workers: Workers
) -> Layout:
    """Decide the sharding once for the run, and record what the workers are."""
    with raised_everywhere():
        world = run.read_json("world.json")
        model_config = load_model_config(config.model)
        base = measure_base(config, model_config)
        parent = Adapter.load(run.parent) if run.parent.exists() else None
        trained = parent.num_parameters if parent else count_trainable(model_config, config.method)
    size, node_group, parallel = workers.world_size, workers.node_group(), config.parallel
    if world:
        parallel = parallel.model_copy(update={"sharding": world["sharding"]})
    seq_len = config.data.max_seq_len if config.data.packing else data.report.tokens_max
    layout, reason = resolve_layout(
        parallel,
        size,
        node_group,
        workers.free_bytes(),
        lambda layout: estimate_memory(config, model_config, base, trained, seq_len, layout),
    )
    if workers.rank == 0:
        logger.info("the base is in %s on %d workers: %s", layout.sharding, size, reason)
    if world is None:
        dist.barrier()  # everybody has looked for world.json before it appears
        with raised_everywhere():
            if workers.rank == 0:
                on_gpu = workers.device.type == "cuda"
                world = {
                    "world_size": size,
                    "num_threads": torch.get_num_threads(),
                    "sharding": layout.sharding,
                    "device": torch.cuda.get_device_name() if on_gpu else "cpu",
                }
                run.write_json("world.json", world)
    return layout


def _recorded_threads(run: RunFolder, num_threads: int) -> int:
    world = run.read_json("world.json")
    return int(world["num_threads"]) if world else num_threads
