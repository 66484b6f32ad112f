"""The run on gloo processes: the same numbers whatever holds the weights and whatever happens."""

import dataclasses
import errno
import itertools
import json
import logging
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
import torch.distributed as dist
from gloo import GlooPool

from s2ft_ray.bases import load_base_model
from s2ft_ray.config import OptimConfig
from s2ft_ray.data import PreparedData, TrainLoader
from s2ft_ray.errors import AdapterError, CheckpointError, JobError
from s2ft_ray.method import Adapter, adapter_files, convert, extract_adapter
from s2ft_ray.training import checkpoint, worker
from s2ft_ray.training.objective import target_loss
from s2ft_ray.training.optimizer import learning_rate
from s2ft_ray.training.parallel import decoder_layers
from s2ft_ray.training.run_folder import RunFolder
from s2ft_ray.training.traffic import TrafficCounter


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.save_base(tmp_path_factory.mktemp("base"))


def train_in(pool: GlooPool, folder: Path, base: Path, **sections: Any) -> RunFolder:
    parallel = {"num_workers": pool.world_size, **sections.pop("parallel", {})}
    run = runs.make_run(folder, base, parallel=parallel, **sections)
    pool.run(runs.train, run.path)
    return run


def largest_difference(left: RunFolder, right: RunFolder) -> float:
    ours, theirs = Adapter.load(left.adapter), Adapter.load(right.adapter)
    assert ours.slices.keys() == theirs.slices.keys()
    return max(
        float((part.delta - theirs.slices[name].delta).abs().max())
        for name, part in ours.slices.items()
    )


def fingerprint(run: RunFolder) -> str:
    return Adapter.load(run.adapter).fingerprint


def test_replicate_and_full_agree_bit_for_bit_on_two_ranks(
    two: GlooPool, tmp_path: Path, base: Path
) -> None:
    replicate = train_in(two, tmp_path / "r", base, parallel={"sharding": "replicate"})
    full = train_in(two, tmp_path / "f", base, parallel={"sharding": "full"})
    assert fingerprint(replicate) == fingerprint(full)
    assert max(float(p.delta.abs().max()) for p in Adapter.load(full.adapter).slices.values()) > 0


def test_bf16_base_agrees_bit_for_bit_and_its_slices_are_fp32(
    two: GlooPool, tmp_path: Path, base: Path
) -> None:
    model = {"name_or_path": str(base), "dtype": "bfloat16"}
    made = [
        train_in(two, tmp_path / mode, base, model=model, parallel={"sharding": mode})
        for mode in ("replicate", "full")
    ]
    assert fingerprint(made[0]) == fingerprint(made[1])
    # fp32 slices move by less than a bf16 step; bf16 ones would lose that.
    deltas = torch.cat([p.delta.flatten() for p in Adapter.load(made[0].adapter).slices.values()])
    assert (deltas != deltas.bfloat16().float()).float().mean() > 0.5


@pytest.mark.parametrize("mode", ["replicate", "full"])
def test_one_and_four_ranks_agree_with_two_to_rounding(
    one: GlooPool, two: GlooPool, four: GlooPool, tmp_path: Path, base: Path, mode: str
) -> None:
    made = {
        pool.world_size: train_in(
            pool, tmp_path / str(pool.world_size), base, parallel={"sharding": mode}
        )
        for pool in (one, two, four)
    }
    assert largest_difference(made[1], made[2]) < 1e-6
    assert largest_difference(made[4], made[2]) < 1e-6


def test_the_loop_equals_a_plain_loop_without_fsdp(
    one: GlooPool, tmp_path: Path, base: Path
) -> None:
    run = train_in(one, tmp_path, base)
    config = run.load_config()
    model = load_base_model(config.model)
    convert(model, config.method)
    data = worker.PreparedData.load(run.data)
    loader = worker.TrainLoader(
        data.train,
        global_batch_size=8,
        micro_batch_size=2,
        rank=0,
        world_size=1,
        seed=config.seed,
        pad_id=0,
    )
    slices = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(slices, betas=(0.9, 0.95), weight_decay=0.0)
    for number in range(6):
        step = loader.next_step()
        optimizer.param_groups[0]["lr"] = learning_rate(config.optim, number, 6)
        optimizer.zero_grad()
        for batch in step.micro_batches:
            (target_loss(model, batch)[0] / step.num_targets).backward()
        torch.nn.utils.clip_grad_norm_(slices, 1.0)
        optimizer.step()
    ours = Adapter.load(run.adapter)
    for name, part in extract_adapter(model).slices.items():
        torch.testing.assert_close(ours.slices[name].delta, part.delta, atol=1e-6, rtol=0)


def test_activation_checkpointing_changes_nothing(
    two: GlooPool, tmp_path: Path, base: Path
) -> None:
    made = [
        train_in(
            two,
            tmp_path / f"{mode}{kept}",
            base,
            parallel={"sharding": mode, "activation_checkpointing": kept},
        )
        for mode in ("replicate", "full")
        for kept in (False, True)
    ]
    assert len({fingerprint(run) for run in made}) == 1


def test_dropout_is_the_same_in_every_run(two: GlooPool, tmp_path: Path) -> None:
    base = runs.save_base(tmp_path / "base", attention_dropout=0.3)
    first, second = (train_in(two, tmp_path / name, base) for name in ("first", "second"))
    assert fingerprint(first) == fingerprint(second)
    other = train_in(two, tmp_path / "other", runs.save_base(tmp_path / "without"))
    assert fingerprint(other) != fingerprint(first)


def train_with_a_layer_left_out(path: Path) -> int:
    """Train where the second layer is left out of each step's first micro-batch."""
    shard, left_out = worker.shard_model, 0

    def shard_and_leave_out(model: Any, workers: Any, layout: Any) -> None:
        layer, passes = decoder_layers(model)[1], itertools.count()
        shard(model, workers, layout)
        forward = layer.forward

        def sometimes(hidden: torch.Tensor, *args: Any, **rest: Any) -> Any:
            nonlocal left_out
            if torch.is_grad_enabled() and next(passes) % 2 == 0:
                left_out += 1
                return hidden
            return forward(hidden, *args, **rest)

        layer.forward = sometimes

    worker.shard_model = shard_and_leave_out
    try:
        runs.train(path)
    finally:
        worker.shard_model = shard
    return left_out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_that_one_micro_batch_leaves_out_trains_by_the_others(
    two: GlooPool, tmp_path: Path, dtype: torch.dtype
) -> None:
    base = runs.save_base(tmp_path / "base", dtype=dtype)
    made = []
    for mode in ("replicate", "full"):
        parallel = {"num_workers": 2, "sharding": mode}
        run = runs.make_run(tmp_path / mode, base, parallel=parallel)
        assert two.run(train_with_a_layer_left_out, run.path) == [6, 6]  # of two in each step
        made.append(run)
    assert fingerprint(made[0]) == fingerprint(made[1])
    parts = Adapter.load(made[0].adapter).slices
    assert all(float(part.delta.abs().max()) > 0 for part in parts.values())


def test_packed_rows_train(two: GlooPool, tmp_path: Path, base: Path) -> None:
    data = {"packing": True, "max_seq_len": 64}
    folder = tmp_path / "run"
    folder.mkdir()
    data["train"] = str(runs.write_rows(folder / "rows.jsonl", 60))
    run = train_in(two, folder, base, data=data)
    losses = [line["loss"] for line in runs.read_metrics(run, "train")]
    assert len(losses) == 6
    assert losses[-1] < losses[0]


# Interruptions


def train_until(path: Path, last: int) -> str:
    """Do a run's steps up to `last`, then die as a killed worker does: without a word."""
    real = worker.train_step

    def step_or_die(*args: Any, number: int, **kwargs: Any) -> Any:
        if number == last:
            raise InterruptedError
        return real(*args, number=number, **kwargs)

    worker.train_step = step_or_die
    try:
        runs.train(path)
    except InterruptedError:
        return "interrupted"
    finally:
        worker.train_step = real
    return "finished"


@pytest.mark.parametrize("mode", ["replicate", "full"])
def test_an_interrupted_run_ends_with_the_same_adapter(
    two: GlooPool, tmp_path: Path, base: Path, mode: str
) -> None:
    parallel, checkpoints = {"sharding": mode}, {"every_steps": 2, "keep": 2}
    whole = train_in(two, tmp_path / "whole", base, parallel=parallel)
    run = runs.make_run(
        tmp_path / "cut", base, parallel={**parallel, "num_workers": 2}, checkpoint={
            **checkpoints, "storage_path": str(tmp_path / "cut" / "runs")
        }
    )  # fmt: skip
    assert two.run(train_until, run.path, 3) == ["interrupted"] * 2  # between checkpoints
    assert not run.adapter.exists()
    two.run(runs.train, run.path)
    assert fingerprint(run) == fingerprint(whole)
    starts = [line["step"] for line in runs.read_metrics(run, "start")]
    assert starts == [0, 2]
    assert sorted(path.name for path in run.checkpoints.iterdir()) == [
        "step-00000004",
        "step-00000006",
    ]


def test_a_run_resumes_on_another_world_size(
    one: GlooPool, two: GlooPool, four: GlooPool, tmp_path: Path, base: Path
) -> None:
    whole = train_in(two, tmp_path / "whole", base)
    for first, then in ((two, one), (one, two), (two, four)):
        folder = tmp_path / f"{first.world_size}to{then.world_size}"
        run = runs.make_run(
            folder, base, checkpoint={"every_steps": 2, "storage_path": str(folder / "runs")}
        )
        assert set(first.run(train_until, run.path, 3)) == {"interrupted"}
        then.run(runs.train, run.path)
        assert largest_difference(run, whole) < 1e-5


def interrupted_run(two: GlooPool, folder: Path, base: Path, **sections: Any) -> RunFolder:
    """Make a run with checkpoints of steps 2 and 4 that was interrupted in step 5."""
    checkpoints = {"every_steps": 2, "storage_path": str(folder / "runs")}
    run = runs.make_run(
        folder, base, parallel={"num_workers": 2}, checkpoint=checkpoints, **sections
    )
    two.run(train_until, run.path, 5)
    return run


@pytest.mark.parametrize("damage", ["truncate", "delete", "manifest", "once more"])
def test_a_damaged_checkpoint_is_passed_over(
    two: GlooPool, tmp_path: Path, base: Path, damage: str
) -> None:
    whole = train_in(two, tmp_path / "whole", base)
    run = interrupted_run(two, tmp_path / "cut", base)
    newest = run.checkpoints / "step-00000004"
    if damage == "once more":
        (run.checkpoints / "damaged-step-00000004").mkdir()
    shard = next(newest.glob("*.distcp"))
    if damage == "truncate":
        shard.write_bytes(shard.read_bytes()[:-7])
    elif damage == "delete":
        shard.unlink()
    else:
        (newest / checkpoint.MANIFEST).write_text("{")
    two.run(runs.train, run.path)
    assert [line["step"] for line in runs.read_metrics(run, "start")] == [0, 2]
    assert fingerprint(run) == fingerprint(whole)
    assert (run.checkpoints / "damaged-step-00000004").is_dir()


def test_damaged_checkpoints_are_told_and_without_a_sound_one_the_run_begins_again(
    two: GlooPool, tmp_path: Path, base: Path
) -> None:
    run = interrupted_run(two, tmp_path / "cut", base)
    for step in (2, 4):
        (run.checkpoints / f"step-{step:08d}" / checkpoint.MANIFEST).write_text("{")
    told, none = two.run(warnings_of_training, run.path)
    newest, older, again = told
    assert f"{run.checkpoints}/step-00000004/checkpoint.json: unreadable" in newest
    assert newest.endswith("; trying the one before")
    assert f"{run.checkpoints}/step-00000002/checkpoint.json: unreadable" in older
    assert again == f"no sound checkpoint is left in {run.checkpoints}: from step 0 again"
    assert none == []
    assert [line["step"] for line in runs.read_metrics(run, "start")] == [0, 0]
    assert fingerprint(run) == fingerprint(train_in(two, tmp_path / "whole", base))


def warnings_of_training(path: Path) -> list[str]:
    """Train; return what this worker has warned of in its log."""
    told: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("s2ft_ray")
    logger.addHandler(handler)
    try:
        runs.train(path)
    finally:
        logger.removeHandler(handler)
    return told


def test_a_fault_of_the_first_worker_alone_is_raised_on_all(
    two: GlooPool, tmp_path: Path, base: Path
) -> None:
    run = interrupted_run(two, tmp_path, base)
    (run.checkpoints / "step-00000004" / checkpoint.MANIFEST).write_text("{")
    in_its_way = run.checkpoints / "damaged-step-00000004"
    in_its_way.write_text("no folder")
    with pytest.raises(CheckpointError, match="Not a directory"):
        two.run(runs.train, run.path)  # a worker that waits for the first one runs into a timeout
    in_its_way.unlink()
    two.run(runs.train, run.path)
    assert fingerprint(run) == fingerprint(train_in(two, tmp_path / "whole", base))


def test_weighted_files_through_a_shuffle_buffer_go_on_where_they_were(
    two: GlooPool, tmp_path: Path, base: Path
) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    files = [
        {"path": str(runs.write_rows(folder / "few.jsonl", 20)), "weight": 2},
        {"path": str(runs.write_rows(folder / "many.jsonl", 60)), "weight": 0.5},
    ]
    buffered = {"train": files, "shuffle_buffer": 8}
    whole = train_in(two, tmp_path / "whole", base, data=buffered)
    run = interrupted_run(two, tmp_path / "cut", base, data=buffered)
    two.run(runs.train, run.path)
    assert [line["step"] for line in runs.read_metrics(run, "start")] == [0, 4]
    assert fingerprint(run) == fingerprint(whole)
    others = [
        train_in(two, tmp_path / "unbuffered", base, data={"train": files}),
        train_in(
            two,
            tmp_path / "unweighted",
            base,
            data={**buffered, "train": [{**file, "weight": 1} for file in files]},
        ),
    ]
    assert fingerprint(whole) not in [fingerprint(other) for other in others]


def test_what_a_killed_worker_had_half_written_is_removed(
    one: GlooPool, tmp_path: Path, base: Path
) -> None:
    run = runs.make_run(tmp_path, base)
    partial = run.checkpoints / ".step-00000003.partial"
    partial.mkdir(parents=True)
    (partial / "__0_0.distcp").write_bytes(b"half")
    one.run(runs.train, run.path)
    assert not list(run.checkpoints.glob(".*"))


def test_a_checkpoint_holds_the_slices_and_not_the_base(two: GlooPool, tmp_path: Path) -> None:
    base = runs.save_base(
        tmp_path / "base",
        hidden_size=256,
        intermediate_size=704,
        num_attention_heads=8,
        head_dim=32,
    )
    run = train_in(
        two,
        tmp_path / "run",
        base,
        method={"budgets": {"o": 0.1, "down": 0.02}},
        optim={"max_steps": 1},
    )
    adapter = Adapter.load(run.adapter)
    sizes = [path.stat().st_size for path in (run.checkpoints / "step-00000001").iterdir()]
    base_bytes = (base / "model.safetensors").stat().st_size
    state_bytes = 12 * adapter.num_parameters  # the slices and two moments, fp32
    assert state_bytes < sum(sizes) < 1.3 * state_bytes + 30_000  # metadata, RNG, manifest
    assert sum(sizes) < 0.2 * base_bytes


def test_the_saved_checkpoint_is_read_back(two: GlooPool, tmp_path: Path, base: Path) -> None:
    run = runs.make_run(tmp_path, base, parallel={"num_workers": 2})
    with pytest.raises(CheckpointError, match="reads back other values"):
        two.run(train_with_a_lying_disk, run.path)
    assert not list(run.checkpoints.glob("step-*"))


def train_with_a_lying_disk(path: Path) -> None:
    real = checkpoint.state_dict_saver.save

    def save_something_else(tensors: dict[str, Any], **kwargs: Any) -> None:
        name = next(iter(tensors["slices"]))
        real(
            {**tensors, "slices": {**tensors["slices"], name: tensors["slices"][name] + 1}},
            **kwargs,
        )

    checkpoint.state_dict_saver.save = save_something_else
    try:
        runs.train(path)
    finally:
        checkpoint.state_dict_saver.save = real


# Faults


def test_an_adapter_for_which_there_is_no_room_is_written_by_the_next_start(
    two: GlooPool, tmp_path: Path, base: Path
) -> None:
    run = runs.make_run(tmp_path, base, parallel={"num_workers": 2})
    with pytest.raises(CheckpointError, match=r"adapter: No space left on device; make room there"):
        two.run(train_on_a_full_disk, run.path)
    assert run.adapter.exists()  # as far as it came
    assert not run.is_trained
    (run.adapter / ".adapter_model.safetensors.kw3").write_bytes(b"of a killed worker")
    two.run(runs.train, run.path)
    assert run.is_trained
    assert len(list(run.adapter.iterdir())) == 2
    assert [line["step"] for line in runs.read_metrics(run, "start")] == [0, 6]
    assert len(runs.read_metrics(run, "train")) == 6
    assert fingerprint(run) == fingerprint(train_in(two, tmp_path / "whole", base))


def train_on_a_full_disk(path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter_files, "replace_files", fill_the_disk)
        runs.train(path)


def fill_the_disk(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("name", ["world.json", "selection.json"])
def test_what_the_first_worker_has_no_room_to_note_is_told_by_all(
    two: GlooPool, tmp_path: Path, base: Path, name: str
) -> None:
    run = runs.make_run(tmp_path, base, parallel={"num_workers": 2})
    for fault in two.run(fault_without_room_for, run.path, name):
        assert fault == f"{run.path / name}: No space left on device; make room there"
    assert not (run.path / name).exists()
    assert not list(run.path.glob(".*"))
    two.run(runs.train, run.path)
    assert run.is_trained


def fault_without_room_for(path: Path, name: str) -> str:
    """Return what the run ends with where the file `name` can't be written."""
    real = RunFolder.write_json

    def write(run: RunFolder, wanted: str, document: dict[str, Any]) -> None:
        with pytest.MonkeyPatch.context() as patch:
            if wanted == name:
                patch.setattr(os, "fsync", fill_the_disk)
            real(run, wanted, document)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "write_json", write)
        with pytest.raises(CheckpointError) as caught:
            runs.train(path)
    return str(caught.value)


def test_workers_that_hold_different_adapters_write_none(
    two: GlooPool, tmp_path: Path, base: Path
) -> None:
    run = runs.make_run(tmp_path, base, parallel={"num_workers": 2})
    with pytest.raises(AdapterError, match="the workers hold different adapters"):
        two.run(train_with_one_part_of_an_adapter, run.path)
    assert not run.adapter.exists()


def train_with_one_part_of_an_adapter(path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(worker, "extract_adapter", lambda model: changed(extract_adapter(model)))
        runs.train(path)


def test_an_adapter_that_reads_back_as_another_is_told(
    one: GlooPool, tmp_path: Path, base: Path
) -> None:
    run = runs.make_run(tmp_path, base)
    with pytest.raises(AdapterError, match="reads back as another one"):
        one.run(train_into_a_wrong_file, run.path)


def train_into_a_wrong_file(path: Path) -> None:
    real = Adapter.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker.Adapter, "save", lambda adapter, out: real(changed(adapter), out))
        runs.train(path)


def changed(adapter: Adapter) -> Adapter:
    """The same but for one value."""
    name, part = next(iter(adapter.slices.items()))
    delta = part.delta.clone()
    delta.view(-1)[0] += 1
    other = dataclasses.replace(part, delta=delta)
    return dataclasses.replace(adapter, slices={**adapter.slices, name: other})


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_rows(
    two: GlooPool, tmp_path: Path, base: Path
) -> None:
    run = runs.make_run(
        tmp_path,
        base,
        parallel={"num_workers": 2},
        optim={"lr": 1e30, "schedule": "constant"},
        checkpoint={"every_steps": 1, "storage_path": str(tmp_path / "runs")},
    )
    with pytest.raises(JobError) as caught:
        two.run(runs.train, run.path)
    assert "step 2: the loss or its gradient is not finite" in str(caught.value)
    assert "lower optim.lr" in str(caught.value)
    assert "last good checkpoint: step 1" in str(caught.value)
    told = re.search(r"rows of that batch: lines ([\d, ]+);", str(caught.value))
    assert told is not None
    assert [int(line) for line in told[1].split(", ")] == lines_of_step(run, 2)
    assert not run.adapter.exists()


def lines_of_step(run: RunFolder, number: int) -> list[int]:
    """Return the lines of the rows that one worker alone would have in a step, from 1."""
    config, data = run.load_config(), PreparedData.load(run.data)
    loader = TrainLoader(
        data.train,
        global_batch_size=config.optim.global_batch_size,
        micro_batch_size=config.optim.micro_batch_size,
        rank=0,
        world_size=1,
        seed=config.seed,
        pad_id=0,
        groups=data.groups,
    )
    *_, step = (loader.next_step() for _ in range(number))
    return sorted(step.lines)


def test_a_full_disk_is_one_clear_fault_and_loses_nothing(
    two: GlooPool, tmp_path: Path, base: Path
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small tmpfs can't be mounted here (needs root)")
    try:
        run = runs.make_run(
            tmp_path / "run",
            base,
            parallel={"num_workers": 2},
            method={"budgets": {"o": 1.0, "down": 1.0}},
            checkpoint={"every_steps": 2, "keep": 50, "storage_path": str(small)},
            optim={"max_steps": 60},
        )
        with pytest.raises(CheckpointError) as caught:
            two.run(runs.train, run.path)
        message = str(caught.value)
        assert "No space left on device" in message
        assert "make room" in message
        good = int(message.rpartition("step ")[2])
        assert good >= 2
        assert (run.checkpoints / f"step-{good:08d}" / checkpoint.MANIFEST).is_file()
        assert len(caught.value.faults) == 1
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)


# What travels


def count_traffic(path: Path) -> dict[str, int]:
    real, seen = worker.train_step, TrafficCounter()

    def counted(*args: Any, number: int, **kwargs: Any) -> Any:
        if number != 1:
            return real(*args, number=number, **kwargs)
        with seen:
            return real(*args, number=number, **kwargs)

    worker.train_step = counted
    try:
        runs.train(path)
    finally:
        worker.train_step = real
    return dict(seen.received)


def test_frozen_weights_are_never_reduced_and_in_replicate_never_travel(
    two: GlooPool, tmp_path: Path, base: Path
) -> None:
    model_bytes = (base / "model.safetensors").stat().st_size
    traffic = {}
    for mode in ("replicate", "full"):
        run = runs.make_run(
            tmp_path / mode,
            base,
            parallel={"num_workers": 2, "sharding": mode},
            method={"budgets": {"o": 0.3, "down": 0.08}},
            optim={"micro_batch_size": 4},
        )
        traffic[mode] = two.run(count_traffic, run.path)[0]
        slices = 4 * Adapter.load(run.adapter).num_parameters
        half = slices / 2  # what the other rank has
        assert half <= traffic[mode]["reduce_scatter"] <= 1.1 * half  # padding to even shards
        gathered = traffic[mode]["gather"]
        if mode == "replicate":
            # Gathered in forward and once more for the write-back.
            assert 2 * half <= gathered <= 2.4 * half
        else:
            assert gathered > 0.8 * model_bytes  # the other rank's half, twice


def optimizer_parameters(path: Path) -> tuple[int, int]:
    kept = []
    real = worker.build_optimizer

    def build(slices: Any, config: OptimConfig) -> torch.optim.AdamW:
        kept.append(real(slices, config))
        return kept[0]

    worker.build_optimizer = build
    try:
        runs.train(path)
    finally:
        worker.build_optimizer = real
    group = kept[0].param_groups[0]["params"]
    local = [state["exp_avg"].to_local().numel() for state in kept[0].state.values()]
    return sum(p.numel() for p in group), sum(local)


@pytest.mark.parametrize("mode", ["replicate", "full"])
def test_the_optimizer_holds_the_slices_alone_and_its_state_is_sharded(
    two: GlooPool, tmp_path: Path, base: Path, mode: str
) -> None:
    run = runs.make_run(tmp_path, base, parallel={"num_workers": 2, "sharding": mode})
    counts = two.run(optimizer_parameters, run.path)
    total = Adapter.load(run.adapter).num_parameters
    assert [count for count, _ in counts] == [total, total]
    assert sum(local for _, local in counts) == total


def test_more_ranks_than_selected_columns_and_uneven_shards(
    four: GlooPool, one: GlooPool, tmp_path: Path
) -> None:
    base = runs.save_base(tmp_path / "base", hidden_size=30, intermediate_size=37)
    method = {"budgets": {"k": 0.1, "up": 0.01, "down": 0.01}}  # one head, one channel
    for mode in ("replicate", "full"):
        alone = train_in(
            one, tmp_path / f"one{mode}", base, method=method, parallel={"sharding": mode}
        )
        spread = train_in(
            four, tmp_path / f"four{mode}", base, method=method, parallel={"sharding": mode}
        )
        assert largest_difference(alone, spread) < 1e-6


def test_every_rank_sees_the_same_metrics_and_samples(
    two: GlooPool, tmp_path: Path, base: Path
) -> None:
    run = train_in(
        two, tmp_path, base, evaluation={"every_steps": 3, "num_samples": 2, "max_new_tokens": 4}
    )
    evals = runs.read_metrics(run, "eval")
    assert [line["step"] for line in evals] == [0, 3, 6]
    assert all(len(line["samples"]) == 2 for line in evals)
    assert evals[-1]["loss"] < evals[0]["loss"]
    world = json.loads((run.path / "world.json").read_text())
    assert world["world_size"] == 2
    assert world["num_threads"] == 1
