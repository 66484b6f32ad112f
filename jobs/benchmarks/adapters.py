"""``jobs/benchmark.py adapters``: what an adapter costs beside its base (the paper's figure 6).

One layer of each width, as wide as high, and adapters of equal parameters: S2FT columns or rows,
twice LoRA's rank of them. Switching is the package's own, with all that it checks; LoRA is merged
twice, by one in-place product (the least that it can cost) and by peft. Invariant: a round gives
every way a turn, each turn puts in and takes out again, and the table holds minima over rounds.
"""

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.machine import describe_machine, load_warning
from s2ft_ray.config import S2FTConfig
from s2ft_ray.method import Adapter, AdapterSlice, BaseInfo, base_fingerprint, fuse

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TARGET_WIDTH, TARGET = 32768, 50.0
"""At this width LoRA's merge is to take at least so many times S2FT's switch."""
COLUMNS, ROWS = "S2FT columns", "S2FT rows"
IN_PLACE, PEFT = "LoRA in place", "LoRA by peft"
MIB = 2**20


@dataclass
class Result:
    """Seconds at one width; lists have an entry a round, and none where there was no room."""

    width: int
    switch_in: dict[str, list[float]] = field(default_factory=dict)
    switch_out: dict[str, list[float]] = field(default_factory=dict)
    fuse: list[float] = field(default_factory=list)
    load: dict[str, list[float]] = field(default_factory=dict)
    disk_bytes: dict[str, int] = field(default_factory=dict)

    def ratio(self, s2ft: str, lora: str) -> float | None:
        """LoRA's merge divided by S2FT's switch; None where one of them found no room."""
        ours, theirs = self.switch_in[s2ft], self.switch_in[lora]
        return min(theirs) / min(ours) if ours and theirs else None


def run(arguments: argparse.Namespace) -> None:
    """Measure every width and print the tables."""
    torch.set_num_threads(arguments.threads)
    machine, warning = describe_machine(torch.device("cpu")), load_warning()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    if warning:
        print(warning)
    results = []
    for width in arguments.widths:
        print(f"width {width}", file=sys.stderr, flush=True)
        results.append(measure(width, DTYPES[arguments.dtype], arguments.rank, arguments.rounds))
        gc.collect()
    print(
        f"\none {arguments.dtype} layer, width x width; rank {arguments.rank},"
        f" {2 * arguments.rank} columns or rows; best of {arguments.rounds} rounds"
    )
    print(render_switch(results))
    print()
    print(render_files(results))
    if arguments.json:
        document = {
            "machine": machine,
            "warning": warning,
            "rank": arguments.rank,
            "dtype": arguments.dtype,
            "results": [asdict(result) for result in results],
        }
        Path(arguments.json).write_text(json.dumps(document, indent=2), encoding="utf-8")


def measure(width: int, dtype: torch.dtype, rank: int, rounds: int) -> Result:
    """Measure one width."""
    result = Result(width, *({name: [] for name in (COLUMNS, ROWS, IN_PLACE, PEFT)} for _ in "io"))
    weight_bytes = width * width * dtype.itemsize
    if not _has_room(weight_bytes):
        return result
    model = build_layer(width, dtype)
    adapters = {COLUMNS: build_adapter(model, "in", rank), ROWS: build_adapter(model, "out", rank)}
    ways = {name: _switch(model, adapter) for name, adapter in adapters.items()}
    ways[IN_PLACE] = _merge_in_place(model, rank)
    # peft makes the product and its scaled copy, in fp32 on the CPU, then one in the base's dtype.
    if _has_room(2 * 4 * width * width + weight_bytes):
        ways[PEFT] = _merge_by_peft(model, rank)
    _take_turns(result, ways, rounds)
    other = build_adapter(model, "in", rank, seed=2)
    result.fuse = [_time(lambda: fuse([adapters[COLUMNS], other])) for _ in range(rounds)]
    _measure_files(result, adapters[COLUMNS], width, rank, rounds)
    return result


def build_layer(width: int, dtype: torch.dtype) -> nn.Module:
    """Return a model of one layer, ``layer``, whose every page has been written."""
    model = nn.Module()
    with torch.device("meta"):
        model.layer = nn.Linear(width, width, bias=False, dtype=dtype)
    weight = torch.full((width, width), 0.01, dtype=dtype)
    model.layer.weight = nn.Parameter(weight, requires_grad=False)
    return model


def build_adapter(model: nn.Module, side: str, rank: int, seed: int = 1) -> Adapter:
    """Return an adapter of the layer with twice `rank` columns ("in") or rows ("out")."""
    generator = torch.Generator().manual_seed(seed)
    width, count = model.layer.weight.shape[0], 2 * rank
    indices = torch.randperm(width, generator=generator)[:count].sort().values.int()
    shape = (width, count) if side == "in" else (count, width)
    delta = 0.01 * torch.randn(shape, generator=generator)
    base = BaseInfo(name=None, revision=None, fingerprint=base_fingerprint(model))
    return Adapter({"layer": AdapterSlice(side, indices, delta)}, base, S2FTConfig())


def render_switch(results: list[Result]) -> str:
    """Return the table of switching: milliseconds, and how many times LoRA's merge is slower."""
    lines = [
        f"| width | {COLUMNS} in / out ms | {ROWS} in / out ms | {IN_PLACE} ms | {PEFT} ms |"
        " in place / columns | in place / rows | peft / columns |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for it in results:
        cells = [
            f"{it.width:,}",
            *(f"{_ms(it.switch_in[way])} / {_ms(it.switch_out[way])}" for way in (COLUMNS, ROWS)),
            _ms(it.switch_in[IN_PLACE]),
            _ms(it.switch_in[PEFT]),
            _ratio(it, COLUMNS, IN_PLACE),
            _ratio(it, ROWS, IN_PLACE),
            _ratio(it, COLUMNS, PEFT),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def render_files(results: list[Result]) -> str:
    """Return the table of fusing, loading and bytes on disk."""
    lines = [
        "| width | fuse two ms | S2FT load ms | LoRA load ms | S2FT MiB on disk | LoRA |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for it in results:
        sizes = [f"{it.disk_bytes[way] / MIB:.2f}" if it.fuse else "-" for way in (COLUMNS, PEFT)]
        loads = [_ms(it.load.get(way, [])) for way in (COLUMNS, PEFT)]
        lines.append(f"| {' | '.join([f'{it.width:,}', _ms(it.fuse), *loads, *sizes])} |")
    return "\n".join(lines)


Way = tuple[Callable[[], object], Callable[[], object]]


def _switch(model: nn.Module, adapter: Adapter) -> Way:
    return (lambda: adapter.switch_into(model)), (lambda: adapter.switch_out(model))


def _merge_in_place(model: nn.Module, rank: int) -> Way:
    a, b = _lora_factors(model, rank)
    weight = model.layer.weight
    return (lambda: weight.addmm_(b, a, alpha=1.0)), (lambda: weight.addmm_(b, a, alpha=-1.0))


def _merge_by_peft(model: nn.Module, rank: int) -> Way:
    beside = nn.Module()  # the same weight, so that the other ways still find it plain
    with torch.device("meta"):
        beside.layer = nn.Linear(1, 1, bias=False)
    beside.layer.in_features = beside.layer.out_features = model.layer.in_features
    beside.layer.weight = model.layer.weight
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["layer"], init_lora_weights=False)
    layer = inject_adapter_in_model(config, beside).layer
    return layer.merge, layer.unmerge


def _lora_factors(model: nn.Module, rank: int) -> tuple[Tensor, Tensor]:
    width, dtype = model.layer.weight.shape[0], model.layer.weight.dtype
    return torch.randn(rank, width, dtype=dtype) / width, torch.randn(width, rank, dtype=dtype)


@torch.no_grad()
def _take_turns(result: Result, ways: dict[str, Way], rounds: int) -> None:
    for put_in, take_out in ways.values():
        put_in()  # memory is touched for the first time
        take_out()
    for _ in range(rounds):
        for name, (put_in, take_out) in ways.items():
            result.switch_in[name].append(_time(put_in))
            result.switch_out[name].append(_time(take_out))


def _measure_files(result: Result, adapter: Adapter, width: int, rank: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory(prefix="s2ft-") as name:
        ours, theirs = Path(name) / "s2ft", Path(name) / "lora.safetensors"
        adapter.save(ours)
        # As peft writes it: fp32, whatever the base is in.
        save_file({"A": torch.ones(rank, width), "B": torch.ones(width, rank)}, theirs)
        result.disk_bytes[COLUMNS] = sum(file.stat().st_size for file in ours.iterdir())
        result.disk_bytes[PEFT] = theirs.stat().st_size
        result.load[COLUMNS] = [_time(lambda: Adapter.load(ours)) for _ in range(rounds)]
        result.load[PEFT] = [_time(lambda: load_file(theirs)) for _ in range(rounds)]


def _has_room(size_bytes: int) -> bool:
    """Tell whether so much can be taken and a quarter more be left."""
    return psutil.virtual_memory().available > 1.25 * size_bytes


def _time(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def _ms(seconds: list[float]) -> str:
    return f"{min(seconds) * 1000:.2f}" if seconds else "-"


def _ratio(it: Result, s2ft: str, lora: str) -> str:
    ratio = it.ratio(s2ft, lora)
    if ratio is None:
        return "-"
    if it.width != TARGET_WIDTH:
        return f"{ratio:.0f}"
    return f"{ratio:.0f} ({'within' if ratio >= TARGET else 'MISSES'} at least {TARGET:.0f})"
