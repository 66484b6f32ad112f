"""More adapters than there is room for: by popularity, and twice as many as fit at once."""

import argparse
import asyncio
import itertools
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.serve_worlds import Record, Shape, ask, build_adapters, build_base, build_engine
from s2ft_ray.errors import S2FTError
from s2ft_ray.method import Adapter
from s2ft_ray.serving.engine import Engine
from s2ft_ray.serving.requests import AdapterKey

SHAPE = Shape(width=512, layers=4, dtype=torch.float32)
CLIENTS = 64
PROMPT_TOKENS, NEW_TOKENS = 16, 16
NUM_FILES = 50  # the adapters of many names share so many files
ON_DEVICE, ON_HOST = 32, 200  # adapters that there is room for
ON_DEVICE_ZIPF = 96  # 64 requests by Zipf's law name about 40 adapters
ZIPF_AT_LEAST, PRESSURE_AT_MOST = 0.94, 5.0


def measure_zipf(arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """1,000 adapters, drawn by Zipf's law, against 5."""
    world = World(arguments.device)
    many, few = world.names(1000), world.names(5)
    weights = [1 / rank for rank in range(1, 1001)]
    results: dict[str, list[dict[str, Any]]] = {"1,000 by Zipf": [], "5": []}
    for number in range(arguments.rounds):
        draw = random.Random(number)
        mixes = {
            "1,000 by Zipf": iter(lambda draw=draw: draw.choices(many, weights)[0], None),
            "5": itertools.cycle(few),
        }
        for name, mix in mixes.items():
            results[name].append(asyncio.run(world.serve(mix, 640, ON_DEVICE_ZIPF, ON_HOST)))
    best = {name: max(found, key=lambda it: it["tokens_per_s"]) for name, found in results.items()}
    share = best["1,000 by Zipf"]["tokens_per_s"] / best["5"]["tokens_per_s"]
    met = "within" if share >= ZIPF_AT_LEAST else "MISSES"
    title = f"{CLIENTS} clients, room for {ON_DEVICE_ZIPF}: {share:.2f} ({met} {ZIPF_AT_LEAST})"
    return _render(title, best), results


def measure_pressure(arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The first token's time with half and with twice as many adapters as have room."""
    world = World(arguments.device)
    results: dict[str, list[dict[str, Any]]] = {"half of the slots": [], "twice the slots": []}
    for _ in range(arguments.rounds):
        for name, count in zip(results, (ON_DEVICE // 2, ON_DEVICE * 2), strict=True):
            draw = random.Random(0)
            names = world.names(count)
            mix = iter(lambda draw=draw, names=names: draw.choice(names), None)
            results[name].append(asyncio.run(world.serve(mix, 640, ON_DEVICE, ON_HOST)))
    best = {name: min(found, key=lambda it: it["first_p99_ms"]) for name, found in results.items()}
    ratio = best["twice the slots"]["first_p99_ms"] / best["half of the slots"]["first_p99_ms"]
    met = "within" if ratio <= PRESSURE_AT_MOST else "MISSES"
    title = (
        f"{CLIENTS} clients, room for {ON_DEVICE}: p99 {ratio:.1f} times ({met} {PRESSURE_AT_MOST})"
    )
    return _render(title, best), results


class World:
    """A small base and adapters in files, read as a replica reads them from its disk."""

    def __init__(self, device: str) -> None:
        self._model = build_base(SHAPE, device=device)
        self._folder = tempfile.TemporaryDirectory(prefix="s2ft-serve-")
        self._files: list[tuple[Path, str]] = []
        for adapter in build_adapters(self._model, SHAPE, NUM_FILES).values():
            path = Path(self._folder.name) / str(len(self._files))
            adapter.save(path)
            self._files.append((path, adapter.fingerprint))
        self.adapter_bytes = SHAPE.layers * SHAPE.num_rows * (SHAPE.width * 4 + 8)

    def names(self, count: int) -> list[AdapterKey]:
        """Return so many adapters; two names never share their memory."""
        return [AdapterKey(f"bench.a{i}", "1", self._files[i % NUM_FILES][1]) for i in range(count)]

    async def serve(
        self, mix: Iterator[AdapterKey], num_requests: int, on_device: int, on_host: int
    ) -> dict[str, Any]:
        """Answer `num_requests`, always from as many clients at once; return what it took."""
        engine = build_engine(
            self._model,
            self._load,
            slot_bytes=on_device * self.adapter_bytes,
            host_bytes=on_host * self.adapter_bytes,
        )
        numbers = iter(range(num_requests))
        records: list[Record] = []
        most: dict[str, int] = {"device": 0, "host": 0}

        async def client() -> None:
            for number in numbers:
                key = next(mix)
                try:
                    record = await ask(engine, f"r{number}", key, PROMPT_TOKENS, NEW_TOKENS)
                except S2FTError as error:
                    record = Record(0.0, [], str(error))
                records.append(record)
                stats = engine.stats()
                most["device"] = max(most["device"], stats.device_used_bytes)
                most["host"] = max(most["host"], stats.host_used_bytes)

        try:
            await _warm_up(engine, self.names(CLIENTS))
            loads = engine.stats().num_loads
            began = time.perf_counter()
            await asyncio.gather(*(client() for _ in range(CLIENTS)))
            took_s = time.perf_counter() - began
        finally:
            stats = engine.stats()
            await asyncio.to_thread(engine.stop)
        firsts = sorted(1000 * it.first_token_s for it in records if not it.fault)
        return {
            "tokens_per_s": num_requests * NEW_TOKENS / took_s,
            "first_median_ms": firsts[len(firsts) // 2],
            "first_p99_ms": firsts[int(0.99 * len(firsts))],
            "num_loads": stats.num_loads - loads,
            "num_failed": num_requests - len(firsts),
            "device_share": most["device"] / (on_device * self.adapter_bytes),
            "host_share": most["host"] / (on_host * self.adapter_bytes),
        }

    def _load(self, key: AdapterKey) -> Adapter:
        return Adapter.load(self._files[int(key.name.removeprefix("bench.a")) % NUM_FILES][0])


async def _warm_up(engine: Engine, keys: list[AdapterKey]) -> None:
    """Serve once before the clock runs."""
    await asyncio.gather(*(ask(engine, f"w{i}", key, 4, 4) for i, key in enumerate(keys[:8])))


def _render(title: str, best: dict[str, dict[str, Any]]) -> str:
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "tokens/s": lambda it: f"{it['tokens_per_s']:.0f}",
        "first token ms, median": lambda it: f"{it['first_median_ms']:.0f}",
        "p99": lambda it: f"{it['first_p99_ms']:.0f}",
        "loads": lambda it: f"{it['num_loads']}",
        "failed": lambda it: f"{it['num_failed']}",
        "device bytes of budget": lambda it: f"{it['device_share']:.2f}",
        "host": lambda it: f"{it['host_share']:.2f}",
    }
    lines = [title, "", f"| adapters | {' | '.join(columns)} |", "|--|" + "--:|" * len(columns)]
    for name, it in best.items():
        lines.append(f"| {name} | {' | '.join(cell(it) for cell in columns.values())} |")
    return "\n".join(lines)
