"""64 requests at once: to the base alone, over 8 and over 64 adapters, S2FT's and LoRA's."""

import argparse
import asyncio
import gc
import itertools
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.serve_lora import LoraLayers
from benchmarks.serve_worlds import Shape, ask_all, build_adapters, build_base, build_engine
from benchmarks.stopwatch import CLOCKS, Clock
from s2ft_ray.serving.engine import Engine
from s2ft_ray.serving.requests import AdapterKey

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NUM_REQUESTS = 64
PROMPT_TOKENS = 16
AT_LEAST = {("bf16", 8): 0.90, ("fp32", 8): 0.90, ("fp32", 64): 0.80}
"""Of the base's tokens/s. In bf16 over 64 adapters it is the byte floor."""
AT_MOST = {"bf16": 0.70, "fp32": 0.85}
"""What S2FT adds to a step, of what LoRA adds."""


@dataclass
class Case:
    """One contender's rounds: tokens/s, and milliseconds of a step in which all decode."""

    name: str
    rates: list[float] = field(default_factory=list)
    steps_ms: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """The best round's tokens/s."""
        return max(self.rates)

    @property
    def step_ms(self) -> float:
        """The best round's step."""
        return min(self.steps_ms)


def measure(arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Measure every dtype; return the tables and the numbers."""
    tables, results = [], {}
    for dtype in arguments.dtype:
        shape = Shape(arguments.width, arguments.layers, DTYPES[dtype])
        cases, floor = asyncio.run(_take_turns(shape, arguments))
        tables.append(_render(dtype, shape, cases, floor))
        results[dtype] = {
            "floor": floor,
            "cases": {c.name: {"rates": c.rates, "steps_ms": c.steps_ms} for c in cases.values()},
        }
        gc.collect()
    return "\n\n".join(tables), results


async def _take_turns(
    shape: Shape, arguments: argparse.Namespace
) -> tuple[dict[str, Case], dict[int, float]]:
    new_tokens, clock = arguments.tokens, CLOCKS[arguments.clock]
    if new_tokens < 3:
        raise SystemExit(f"--tokens {new_tokens}: takes 3 or more, for steps in which all decode")
    model = build_base(shape, device=arguments.device)
    adapters = build_adapters(model, shape, NUM_REQUESTS)
    size = shape.layers * shape.num_rows * (shape.width * shape.dtype.itemsize + 8)
    engine = build_engine(
        model,
        adapters.__getitem__,
        slot_bytes=65 * size,
        host_bytes=max(2**33, 2 * 65 * size),
        # in whole pages of 32 tokens: no request is thrown out for another
        cache_tokens=max(4096, NUM_REQUESTS * (PROMPT_TOKENS + new_tokens + 32)),
    )
    keys = list(adapters)
    loras = {count: LoraLayers(model, keys[:count], shape.rank) for count in (8, 64)}
    s2ft, steps = engine._layers, _Steps(engine, clock)
    plans: dict[str, tuple[Any, Sequence[AdapterKey | None]]] = {"base alone": (s2ft, [None])}
    for count in (8, 64):
        plans[f"S2FT over {count}"] = (s2ft, keys[:count])
        plans[f"LoRA over {count}"] = (loras[count], keys[:count])
    cases = {name: Case(name) for name in plans}
    try:
        for number in range(arguments.rounds + 1):
            for name, (layers, of) in plans.items():
                asked = list(itertools.islice(itertools.cycle(of), NUM_REQUESTS))
                steps.begun.clear()
                with _layers(engine, layers):
                    records = await ask_all(engine, asked, PROMPT_TOKENS, new_tokens, clock)
                if not number:  # adapters were loaded, kernels chosen
                    continue
                began = min(record.sent_at for record in records)
                ended = max(record.arrivals[-1] for record in records)
                cases[name].rates.append(NUM_REQUESTS * new_tokens / (ended - began))
                cases[name].steps_ms.append(1000 * statistics.median(steps.seconds()))
    finally:
        for lora in loras.values():
            lora.remove()
        await asyncio.to_thread(engine.stop)
    base_bytes = sum(parameter.nbytes for parameter in model.parameters())
    adapter_bytes = shape.layers * shape.num_rows * shape.width * shape.dtype.itemsize
    return cases, {n: base_bytes / (base_bytes + n * adapter_bytes) for n in (8, 64)}


class _Steps:
    """Notes when the engine's steps begin: a client may see the tokens of several at once."""

    def __init__(self, engine: Engine, clock: Clock) -> None:
        self._clock = clock
        self._route = engine._batching._route
        engine._batching._route = self
        self.begun: list[tuple[float, bool]] = []
        """By the clock, and whether all requests decode in it."""

    def __call__(self, batch: list[tuple[str, int]]) -> None:
        decode = len(batch) == NUM_REQUESTS and all(num_tokens == 1 for _, num_tokens in batch)
        self.begun.append((self._clock(), decode))
        self._route(batch)

    def seconds(self) -> list[float]:
        """Return what each step took in which all decode and which another one followed."""
        pairs = itertools.pairwise(self.begun)
        return [after - at for (at, decode), (after, _) in pairs if decode]


@contextmanager
def _layers(engine: Engine, layers: Any) -> Iterator[None]:
    """Let the engine route to other layers than its own."""
    own = engine._layers
    engine._layers, engine._composition = layers, []
    try:
        yield
    finally:
        layers.routing = None
        engine._layers, engine._composition = own, []


def _render(dtype: str, shape: Shape, cases: dict[str, Case], floor: dict[int, float]) -> str:
    base = cases["base alone"]
    lines = [
        f"{dtype}, width {shape.width}, {shape.layers} layers; {shape.num_rows} rows a layer,"
        f" LoRA's rank {shape.rank}; {NUM_REQUESTS} requests at once",
        "",
        "| | tokens/s | of the base | byte floor | distance | step ms | added ms | of LoRA's |",
        "|--|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for case in cases.values():
        cells = [case.name, f"{case.rate:.0f}"]
        if case is base:
            cells += ["1", "", "", f"{case.step_ms:.1f}", "", ""]
        else:
            kind, _, count = case.name.partition(" over ")
            share, limit = case.rate / base.rate, floor[int(count)]
            added = case.step_ms - base.step_ms
            cells += [f"{share:.2f}", f"{limit:.2f}", f"{share - limit:+.2f}"]
            cells += [f"{case.step_ms:.1f}", f"{added:.1f}", ""]
            if kind == "S2FT":
                least = AT_LEAST.get((dtype, int(count)), limit)
                cells[2] += f" ({_verdict(share >= least)} at least {least:.2f})"
                theirs = cases[f"LoRA over {count}"].step_ms - base.step_ms
                most = AT_MOST[dtype]
                met = _verdict(added <= most * theirs)
                cells[-1] = f"{added / theirs:.2f} ({met} at most {most:.2f})"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _verdict(is_met: bool) -> str:
    return "within" if is_met else "MISSES"
