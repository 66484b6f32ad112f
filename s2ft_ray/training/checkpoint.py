"""Checkpoints: the slices, their optimizer state, the data's position and the RNG; never the base.

    checkpoints/step-00000050/
        *.distcp, .metadata   tensors, by torch.distributed.checkpoint: any world size can read them
        checkpoint.json       step, loader's position, world size, the best evaluation so far,
                              and the digest of each file

A checkpoint holds training up while the state is copied; a thread of each worker writes the copy,
with a process group of its own, while the next steps are made.

Invariant: a folder named ``step-*`` is complete and was read back equal on every worker; it is
written under another name and renamed. ``.metadata`` is a pickle: load from your own storage only.
"""

import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor

from s2ft_ray.data import TrainLoader
from s2ft_ray.errors import CheckpointError
from s2ft_ray.training.evaluation import Standing
from s2ft_ray.training.parallel import Workers

logger = logging.getLogger(__name__)
MANIFEST = "checkpoint.json"
_Result = TypeVar("_Result")


@dataclass
class TrainState:
    """What a step changes: all that a checkpoint holds."""

    slices: dict[str, nn.Parameter]
    """By name in the model, in the model's order."""
    optimizer: torch.optim.AdamW
    loader: TrainLoader
    step: int = 0
    """Steps done."""
    standing: Standing = field(default_factory=Standing)


class Checkpointer:
    """Saves and restores a TrainState under one folder, with all workers together.

    Leaving it as a context ends what is being written, also where training ends by an error.
    """

    def __init__(
        self, folder: Path, *, keep: int, workers: Workers, keep_best: bool = False
    ) -> None:
        """`keep_best` also keeps the one at the step of the best evaluation."""
        self._folder = folder
        self.keep_best = keep_best
        self._keep = keep
        self._workers = workers
        # On the CPU whatever the workers' device; never used by training, beside which it runs.
        self._group = dist.new_group(backend="gloo")
        self._stager = DefaultStager(StagingOptions(False, False, False, False))
        self._pending: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.settle()
            elif self._pending is not None and (fault := self._pending.exception()):
                # Told beside the error that has ended the training, which goes on.
                logger.warning("the newest checkpoint is not saved: %s", fault)
        finally:
            self._stager.close()
            dist.destroy_process_group(self._group)

    def save(self, state: TrainState) -> None:
        """Copy `state` and begin to write it; return while it is being written.

        What is written gets read back and committed, and the oldest beyond `keep` is dropped.
        All workers call this together. Raises CheckpointError on every worker when the checkpoint
        before could not be written or reads back something else; those before it stay as they
        were. `settle` raises the same of this one.
        """
        self.settle()
        tensors = self._stager.stage(_tensors_of(state, self._workers))
        assert isinstance(tensors, dict)
        manifest = {
            "step": state.step,
            "world_size": self._workers.world_size,
            "standing": asdict(state.standing),
            "loader": state.loader.state_dict(),
        }
        pending: Future[None] = Future()

        def write() -> None:
            try:
                self._write(tensors, manifest)
                pending.set_result(None)
            except BaseException as error:  # noqa: BLE001 - raised where it is waited for
                pending.set_exception(error)

        # A daemon: a worker that is to end doesn't wait for peers that have gone.
        threading.Thread(target=write, name="checkpoint", daemon=True).start()
        self._pending = pending

    def settle(self) -> None:
        """Wait until what was saved last is on disk. Raises as `save` does."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, tensors: dict[str, Any], manifest: dict[str, Any]) -> None:
        final = self._folder / f"step-{manifest['step']:08d}"
        partial = self._folder / f".{final.name}.partial"
        self._on_first_worker(lambda: _make_empty(partial))
        self._together(
            partial,
            lambda: state_dict_saver.save(
                tensors, checkpoint_id=partial, process_group=self._group
            ),
        )
        self._read_back(partial, tensors)
        self._on_first_worker(lambda: self._commit(partial, final, manifest))

    def restore(self, state: TrainState) -> int:
        """Load the newest sound checkpoint into `state`; return its step, 0 where there is none.

        A damaged one is passed over with a warning that names it and what is wrong with it; where
        no other is left, the run begins again, which is told too.
        """
        self._on_first_worker(self._remove_partial)
        chosen = self._on_first_worker(self._newest_sound)
        if chosen is None:
            return 0
        folder, manifest = chosen
        tensors = _tensors_of(state, self._workers)
        if manifest["world_size"] != self._workers.world_size:
            tensors.pop("rng")  # streams of other workers mean nothing to these
        self._load(folder, tensors)
        state.step = manifest["step"]
        state.standing = Standing(**manifest["standing"])
        state.loader.load_state_dict(manifest["loader"])
        if "rng" in tensors:
            _set_rng_state(tensors["rng"][f"rank{self._workers.rank}"])
        return state.step

    def restore_slices(self, state: TrainState, step: int) -> bool:
        """Load the slices of the checkpoint at `step` alone; return False where it isn't sound."""
        folder = self._folder / f"step-{step:08d}"
        sound = self._on_first_worker(lambda: _is_sound(folder))
        if sound:
            tensors = {"slices": _tensors_of(state, self._workers)["slices"]}
            self._load(folder, tensors)
        return sound

    def newest_step(self) -> int:
        """Return the step of the newest committed checkpoint, 0 where there is none."""
        folders = self._committed()
        return int(folders[-1].name.removeprefix("step-")) if folders else 0

    def _committed(self) -> list[Path]:
        return sorted(self._folder.glob("step-*"))

    def _remove_partial(self) -> None:
        """Remove what workers that were killed had half written."""
        for partial in self._folder.glob(".step-*.partial"):
            shutil.rmtree(partial)

    def _newest_sound(self) -> tuple[Path, dict[str, Any]] | None:
        committed = self._committed()
        for folder in reversed(committed):
            try:
                return folder, _verify_files(folder)
            except CheckpointError as error:
                logger.warning("checkpoint passed over: %s; trying the one before", error)
                # Out of the way, so that pruning never keeps it in a sound one's place.
                aside = folder.with_name(f"damaged-{folder.name}")
                if aside.exists():  # the step was made again, and damaged again
                    shutil.rmtree(aside)
                folder.rename(aside)
        if committed:
            logger.warning("no sound checkpoint is left in %s: from step 0 again", self._folder)
        return None

    def _read_back(self, partial: Path, tensors: dict[str, Any]) -> None:
        copies = _empty_like(tensors)
        self._load(partial, copies)
        unequal = torch.tensor(0 if _equal(tensors, copies) else 1)
        dist.all_reduce(unequal, group=self._group)
        if unequal:
            raise CheckpointError(
                f"{partial}: reads back other values than were written;"
                f" last good checkpoint: step {self.newest_step()}"
            )

    def _commit(self, partial: Path, final: Path, manifest: dict[str, Any]) -> None:
        files = {path.name: _digest(path) for path in sorted(partial.iterdir())}
        with (partial / MANIFEST).open("w", encoding="utf-8") as file:
            json.dump({**manifest, "files": files}, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(final)
        best = f"step-{manifest['standing']['step']:08d}" if self.keep_best else None
        for old in self._committed()[: -self._keep]:
            if old.name != best:
                shutil.rmtree(old)

    def _load(self, folder: Path, tensors: dict[str, Any]) -> None:
        self._together(
            folder,
            lambda: state_dict_loader.load(
                tensors, checkpoint_id=folder, process_group=self._group
            ),
        )

    def _together(self, folder: Path, action: Callable[[], object]) -> None:
        """Run a collective of DCP; its failure is a CheckpointError on every worker."""
        try:
            action()
        except CheckpointException as error:  # a BaseException; raised on every worker alike
            causes = "; ".join(
                sorted({f"{type(exc).__name__}: {exc}" for exc, _ in error.failures.values()})
            )
            raise CheckpointError(self._describe(folder, causes)) from error

    def _on_first_worker(self, action: Callable[[], _Result]) -> _Result:
        """Return on every worker what `action` returns on rank 0.

        An OSError of it is a CheckpointError on all of them.
        """
        told: list[Any] = [None, None]
        if self._workers.rank == 0:
            try:
                told[0] = action()
            except OSError as error:
                told[1] = self._describe(self._folder, error.strerror or str(error))
        dist.broadcast_object_list(told, group=self._group)
        if told[1] is not None:
            raise CheckpointError(told[1])
        result: _Result = told[0]
        return result

    def _describe(self, folder: Path, cause: str) -> str:
        return (
            f"{folder}: {cause}; make room there or name another checkpoint.storage_path;"
            f" last good checkpoint: step {self.newest_step()}"
        )


def _tensors_of(state: TrainState, workers: Workers) -> dict[str, Any]:
    """Name the live tensors of `state`; optimizer state that isn't there yet is made as zeros."""
    moments: dict[str, dict[str, Tensor]] = {}
    for name, slice_ in state.slices.items():
        entry = state.optimizer.state[slice_]
        if not entry:
            # Fused AdamW counts its steps on the parameter's device.
            entry["step"] = torch.zeros((), dtype=torch.float32, device=slice_.device)
            entry["exp_avg"] = torch.zeros_like(slice_.detach())
            entry["exp_avg_sq"] = torch.zeros_like(slice_.detach())
        moments[name] = dict(entry)
    return {
        "slices": {name: slice_.detach() for name, slice_ in state.slices.items()},
        "optimizer": moments,
        "rng": {f"rank{workers.rank}": _rng_state()},
    }


def _rng_state() -> Tensor:
    """The generators of this worker, as bytes: the CPU's, then its GPU's."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states.append(torch.cuda.get_rng_state())
    return torch.cat(states)


def _set_rng_state(state: Tensor) -> None:
    size = torch.get_rng_state().numel()
    torch.set_rng_state(state[:size].clone())
    if state.numel() > size:
        torch.cuda.set_rng_state(state[size:].clone())


def _empty_like(tensors: dict[str, Any]) -> dict[str, Any]:
    """Copy the structure with tensors that hold nothing yet (all bits set: no value of ours)."""
    return {
        key: _empty_like(value)
        if isinstance(value, dict)
        else torch.full_like(value, 255 if value.dtype == torch.uint8 else torch.nan)
        for key, value in tensors.items()
    }


def _equal(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return all(
        _equal(value, right[key])
        if isinstance(value, dict)
        else torch.equal(_local(value), _local(right[key]))
        for key, value in left.items()
    )


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _verify_files(folder: Path) -> dict[str, Any]:
    """Check every file against the manifest. Raises CheckpointError naming the first fault."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files: dict[str, str] = manifest["files"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder / MANIFEST}: unreadable ({error})") from error
    for name, digest in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing")
        try:
            found = _digest(path)
        except OSError as error:
            raise CheckpointError(f"{path}: unreadable ({error})") from error
        if found != digest:
            raise CheckpointError(f"{path}: damaged, its sha256 is not the one recorded")
    return manifest


def _is_sound(folder: Path) -> bool:
    try:
        _verify_files(folder)
    except CheckpointError as error:
        logger.warning("the best checkpoint can't be used: %s", error)
        return False
    return True


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
