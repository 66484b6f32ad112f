"""One layer under 10 to 10,000 adapters, a token of each: S2FT's two sides against LoRA.

The figure 6 of arXiv 2412.06289. S2FT runs in the engine's own layers; LoRA's two products each
run on the kernel that is fastest for their shapes. Beside the whole layer the adapters' part is
timed by itself, and the table has two limits: the share of LoRA's time that the layer alone takes,
below which no adapter comes, however fast; and the time in which the adapters' rows are read once.

On the CPU a time is that of one call. On CUDA it is the device's, of a call in a replayed graph,
with weights and adapters that no cache holds (see `stopwatch`); the second table has the wall time
of the same calls launched by Python, which is what an engine without graphs pays at most.
"""

import argparse
import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.serve_lora import FIRST, SECOND, Products
from benchmarks.stopwatch import CLOCKS, Clock, Series, num_copies, series_length
from s2ft_ray.config import S2FTConfig
from s2ft_ray.method import Adapter, AdapterSlice, BaseInfo
from s2ft_ray.serving.batched_layers import BatchedLayers
from s2ft_ray.serving.device_slots import DeviceSlots, Layout, Slot, SlotPart
from s2ft_ray.serving.engine_stats import AdapterEvents
from s2ft_ray.serving.requests import AdapterKey
from s2ft_ray.serving.routing import Routing

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RANK = 32
NUM_ROWS = 2 * RANK  # of an adapter: as many parameters as LoRA's
FEWEST_TOKENS = 64
KINDS = ("base", "in", "out", "LoRA")
AT_MOST = {"in": 0.85, "out": 0.78}
"""Of LoRA's time for the whole layer."""
FEWEST_ROUNDS = 3
CUDA_ROUNDS = 10
"""For each of `--rounds`, whatever the number of tokens."""

Hook = Callable[..., None]


def measure(arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Measure every dtype and number of adapters; return the tables and the numbers."""
    tables, results = [], {}
    device, clock = torch.device(arguments.device), CLOCKS[arguments.clock]
    for dtype in arguments.dtype:
        found, queued = {}, {}
        for count in arguments.adapters:
            layer = _Layer(arguments.width, DTYPES[dtype], count, device)
            found[count], queued[count] = _take_turns(layer, arguments.rounds, clock)
            del layer
            gc.collect()  # its hooks and models hold each other, and gigabytes
        tables.append(_render(f"{dtype}, {_title(arguments.width, device)}", found))
        results[dtype] = found
        if device.type == "cuda":
            tables.append(_render_queued(dtype, queued))
            results[f"{dtype} queued"] = queued
    return "\n\n".join(tables), results


class _Layer:
    """One layer and its adapters, each as often as it takes for no cache to hold them."""

    def __init__(self, width: int, dtype: torch.dtype, count: int, device: torch.device) -> None:
        """Build copies of the weights, and pools of `count` adapters, which all kinds read."""
        self.width, self.dtype, self.count, self.device = width, dtype, count, device
        self.num_tokens = -(-FEWEST_TOKENS // count) * count
        torch.manual_seed(0)
        self.x = torch.randn(1, self.num_tokens, width, dtype=dtype, device=device)
        # All kinds read the same memory: 10,000 adapters of each wouldn't fit side by side.
        row_bytes = width * dtype.itemsize
        pools = [
            DeviceSlots(width, dtype, device, count * NUM_ROWS * (row_bytes + 8), AdapterEvents())
            for _ in range(num_copies(device, count * NUM_ROWS * row_bytes))
        ]
        for pool in pools:
            pool.rows.normal_(std=0.01)
        hooks = {side: [self._s2ft(side, pool) for pool in pools] for side in ("in", "out")}
        hooks["LoRA"] = self._lora(pools)
        self.calls: dict[str, list[Callable[[], object]]] = {}
        length = max(series_length(device, width * row_bytes), len(pools))
        output = torch.zeros(1, self.num_tokens, width, dtype=dtype, device=device)
        for kind in KINDS:
            layers = [self._plain() for _ in range(length)]
            self.calls[kind] = [partial(layer, self.x) for layer in layers]
            if kind in hooks:
                own = [hooks[kind][i % len(pools)] for i in range(length)]
                for layer, hook in zip(layers, own, strict=True):
                    layer.register_forward_hook(hook)
                part = [partial(hook, layers[0], (self.x,), output) for hook in own]
                self.calls[f"{kind} part"] = part
        self.calls["read"] = [_reader(pools[i % len(pools)].rows) for i in range(length)]

    def _plain(self) -> nn.Linear:
        return nn.Linear(self.width, self.width, bias=False, dtype=self.dtype, device=self.device)

    def _s2ft(self, side: Any, pool: DeviceSlots) -> Hook:
        """Return the hook of the engine's own layers, with an adapter for each range of a pool."""
        model = nn.Module()
        model.layer = self._plain()
        layout = Layout({"layer": SlotPart(side, 0, NUM_ROWS)})
        slots = []
        for number in range(self.count):
            start = number * NUM_ROWS
            places = torch.randperm(self.width)[:NUM_ROWS].sort().values
            pool.places[start : start + NUM_ROWS] = places
            key = AdapterKey("a", str(number), "")
            slots.append(Slot(key, start, NUM_ROWS, layout, since=0, last_used=0))
        layers = BatchedLayers(model, pool)
        empty = AdapterSlice(side, torch.zeros(1).int(), torch.zeros(1, self.width))
        adapter = Adapter({"layer": empty}, BaseInfo(None, None, ""), S2FTConfig())
        layers.prepare(slots[0].key, adapter)
        ranges = [(slots[token % self.count], token, token + 1) for token in range(self.num_tokens)]
        # The plan of a batch is made at its first pass and holds while the same requests decode.
        layers.routing = Routing(ranges, pool)
        model.layer(self.x)
        (hook,) = model.layer._forward_hooks.values()
        return hook

    def _lora(self, pools: list[DeviceSlots]) -> list[Hook]:
        """Return the hooks of LoRA's two products, half of a pool's rows each."""
        count, width = self.count, self.width
        down, up = Products(FIRST, replayed=True), Products(SECOND, replayed=True)
        order = torch.arange(self.num_tokens).view(-1, count).T.flatten()  # by adapter
        tokens = order.to(self.device)
        factors = [pool.rows.view(2, count, RANK, width) for pool in pools]
        inputs = self.x[0].index_select(0, tokens).view(count, -1, width)
        down.choose([(a, inputs) for a, _ in factors])
        inner = down(factors[0][0], inputs)
        up.choose([(b.transpose(1, 2), inner) for _, b in factors])

        def build(a: Tensor, b: Tensor) -> Hook:
            def add(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                inputs = args[0][0].index_select(0, tokens).view(count, -1, width)
                products = up(b.transpose(1, 2), down(a, inputs))
                output[0].index_add_(0, tokens, products.reshape(self.num_tokens, -1))

            return add

        return [build(a, b) for a, b in factors]


def _reader(rows: Tensor) -> Callable[[], object]:
    """Return the call that reads memory fastest: a sum on CUDA, on the CPU a product."""
    words = rows.view(torch.float32)
    if rows.is_cuda:
        return words.sum
    return partial(torch.mv, words, torch.ones(words.shape[1]))


def _take_turns(
    layer: _Layer, rounds: int, clock: Clock
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the best milliseconds of the layer alone, with each kind of adapter, and of its part.

    "in" is the whole layer's time, "in part" that of what its hook adds to an output; "read" is
    that of reading the adapters' rows. The second ones are those of the calls as Python makes them.
    """
    series = {name: Series(calls, layer.device, clock) for name, calls in layer.calls.items()}
    for name, one in series.items():
        if one.fault:
            print(f"{layer.count} adapters, {name}: launched by Python, not captured: {one.fault}")
    best, queued = (dict.fromkeys(series, float("inf")) for _ in range(2))
    is_cuda = layer.device.type == "cuda"
    number = rounds * CUDA_ROUNDS if is_cuda else rounds * 1000 // layer.num_tokens
    for _ in range(max(FEWEST_ROUNDS, number)):
        for name, one in series.items():
            best[name] = min(best[name], 1000 * one.seconds())
            if is_cuda:
                queued[name] = min(queued[name], 1000 * one.queued_s())
    return best, queued


def _title(width: int, device: torch.device) -> str:
    how = ", replayed" if device.type == "cuda" else ""
    return f"one layer of {width:,} x {width:,}; {NUM_ROWS} rows against rank {RANK}{how}"


def _render(title: str, found: dict[int, dict[str, float]]) -> str:
    lines = [
        title,
        "",
        "| adapters | layer alone ms | S2FT in | S2FT out | LoRA | in / LoRA | out / LoRA |"
        " layer alone / LoRA | rows read ms | parts ms: in | out | LoRA | in / LoRA | out / LoRA |",
        "|" + "--:|" * 14,
    ]
    for count, best in found.items():
        cells = [f"{count:,}", *(_ms(best[name]) for name in KINDS)]
        for side, most in AT_MOST.items():
            ratio = best[side] / best["LoRA"]
            cells.append(f"{ratio:.2f} ({'within' if ratio <= most else 'MISSES'} {most:.2f})")
        cells.append(f"{best['base'] / best['LoRA']:.2f}")
        cells += [_ms(best[name]) for name in ("read", *(f"{k} part" for k in KINDS[1:]))]
        cells += [f"{best[f'{side} part'] / best['LoRA part']:.2f}" for side in AT_MOST]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _render_queued(dtype: str, found: dict[int, dict[str, float]]) -> str:
    """Render the wall time of calls that Python launches."""
    lines = [
        f"{dtype}, launched by Python",
        "",
        "| adapters | layer alone ms | S2FT in | S2FT out | LoRA | in / LoRA | out / LoRA |",
        "|" + "--:|" * 7,
    ]
    for count, best in found.items():
        cells = [f"{count:,}", *(_ms(best[name]) for name in KINDS)]
        cells += [f"{best[side] / best['LoRA']:.2f}" for side in AT_MOST]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _ms(value: float) -> str:
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"
