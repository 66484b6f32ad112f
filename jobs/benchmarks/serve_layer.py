"""One layer under 10 to 10,000 adapters, a token of each: S2FT's two sides against LoRA.

The figure 6 of arXiv 2412.06289. S2FT runs in the engine's own layers; LoRA's two products each
run on the kernel that is fastest for their shapes. Beside the whole layer the adapters' part is
timed by itself, and the table has two limits: the share of LoRA's time that the layer alone takes,
below which no adapter comes, however fast; and the time in which the adapters' rows are read once.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.serve_lora import FIRST, SECOND, Products
from benchmarks.serve_mixed import DTYPES
from benchmarks.serve_worlds import CLOCKS, Clock
from s2ft_ray.config import S2FTConfig
from s2ft_ray.method import Adapter, AdapterSlice, BaseInfo
from s2ft_ray.serving.batched_layers import BatchedLayers
from s2ft_ray.serving.device_slots import DeviceSlots, Slot, SlotPart
from s2ft_ray.serving.engine_stats import AdapterEvents
from s2ft_ray.serving.requests import AdapterKey
from s2ft_ray.serving.routing import Routing

WIDTH, RANK = 2048, 32
FEWEST_TOKENS = 64
KINDS = ("base", "in", "out", "LoRA")
AT_MOST = {"in": 0.85, "out": 0.78}
"""Of LoRA's time for the whole layer."""
FEWEST_ROUNDS = 3


def measure(arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Measure every dtype and number of adapters; return the tables and the numbers."""
    tables, results = [], {}
    clock = CLOCKS[arguments.clock]
    for dtype in arguments.dtype:
        found = {
            count: _take_turns(DTYPES[dtype], count, arguments.rounds, clock)
            for count in arguments.adapters
        }
        tables.append(_render(dtype, found))
        results[dtype] = found
    return "\n\n".join(tables), results


def _take_turns(dtype: torch.dtype, count: int, rounds: int, clock: Clock) -> dict[str, float]:
    """Return the best milliseconds of the layer alone, with each kind of adapter, and of its part.

    "in" is the whole layer's time, "in part" that of what its hook adds to an output; "read" is
    that of reading the adapters' rows.
    """
    torch.manual_seed(0)
    num_tokens = -(-FEWEST_TOKENS // count) * count
    x = torch.randn(1, num_tokens, WIDTH, dtype=dtype)
    # All kinds read the same memory: 10,000 adapters of each wouldn't fit side by side.
    size_bytes = count * 2 * RANK * (WIDTH * dtype.itemsize + 8)
    pool = DeviceSlots(WIDTH, dtype, x.device, size_bytes, AdapterEvents())
    pool.rows.normal_(std=0.01)
    layers = {name: nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype) for name in KINDS}
    _add_s2ft(layers["in"], "in", pool, num_tokens, count)
    _add_s2ft(layers["out"], "out", pool, num_tokens, count)
    _add_lora(layers["LoRA"], pool, num_tokens, count)
    calls: dict[str, Callable[[], object]] = {}
    output = torch.zeros(1, num_tokens, WIDTH, dtype=dtype)
    for name, layer in layers.items():
        calls[name] = partial(layer, x)
        for hook in layer._forward_hooks.values():
            calls[f"{name} part"] = partial(hook, layer, (x,), output)
    words = pool.rows.view(torch.float32)  # as a product of bytes: the fastest reader of memory
    calls["read"] = partial(torch.mv, words, torch.ones(words.shape[1]))
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(max(FEWEST_ROUNDS, rounds * 1000 // num_tokens)):
        for name, call in calls.items():
            started = clock()
            call()
            best[name] = min(best[name], 1000 * (clock() - started))
    return best


def _add_s2ft(layer: nn.Linear, side: Any, pool: DeviceSlots, num_tokens: int, count: int) -> None:
    """Hook the engine's own layers, with an adapter for every range of the pool."""
    num_rows = 2 * RANK  # as many parameters as LoRA's
    model = nn.Module()
    model.layer = layer
    slots = []
    for number in range(count):
        start = number * num_rows
        pool.places[start : start + num_rows] = torch.randperm(WIDTH)[:num_rows].sort().values
        key, parts = AdapterKey("a", str(number), ""), {"layer": SlotPart(side, start, num_rows)}
        slots.append(Slot(key, start, num_rows, parts, since=0, last_used=0))
    layers = BatchedLayers(model, pool)
    empty = AdapterSlice(side, torch.zeros(1).int(), torch.zeros(1, WIDTH))
    adapter = Adapter({"layer": empty}, BaseInfo(None, None, ""), S2FTConfig())
    layers.prepare(slots[0].key, adapter)
    ranges = [(slots[token % count], token, token + 1) for token in range(num_tokens)]
    # The plan of a batch is made at its first pass and holds while the same requests decode.
    layers.routing = Routing(ranges, pool)
    layer(torch.zeros(1, num_tokens, WIDTH, dtype=layer.weight.dtype))


def _add_lora(layer: nn.Linear, pool: DeviceSlots, num_tokens: int, count: int) -> None:
    """Hook LoRA's two products, half of the pool's rows each."""
    a, b = pool.rows.view(2, count, RANK, WIDTH)
    down, up = Products(FIRST), Products(SECOND)
    tokens = torch.arange(num_tokens).view(-1, count).T.flatten()  # by adapter

    def add(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        inputs = args[0][0].index_select(0, tokens).view(count, -1, WIDTH)
        products = up(b.transpose(1, 2), down(a, inputs))
        output[0].index_add_(0, tokens, products.reshape(num_tokens, -1))

    layer.register_forward_hook(add)
    layer(torch.zeros(1, num_tokens, WIDTH, dtype=layer.weight.dtype))  # chooses the kernels


def _render(dtype: str, found: dict[int, dict[str, float]]) -> str:
    lines = [
        f"{dtype}, one layer of {WIDTH:,} x {WIDTH:,}; {2 * RANK} rows against rank {RANK}",
        "",
        "| adapters | layer alone ms | S2FT in | S2FT out | LoRA | in / LoRA | out / LoRA |"
        " layer alone / LoRA | rows read ms | parts ms: in | out | LoRA | in / LoRA | out / LoRA |",
        "|" + "--:|" * 14,
    ]
    for count, best in found.items():
        cells = [f"{count:,}", *(f"{best[name]:.2f}" for name in KINDS)]
        for side, most in AT_MOST.items():
            ratio = best[side] / best["LoRA"]
            cells.append(f"{ratio:.2f} ({'within' if ratio <= most else 'MISSES'} {most:.2f})")
        cells.append(f"{best['base'] / best['LoRA']:.2f}")
        cells += [f"{best[name]:.2f}" for name in ("read", *(f"{k} part" for k in KINDS[1:]))]
        cells += [f"{best[f'{side} part'] / best['LoRA part']:.2f}" for side in AT_MOST]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
