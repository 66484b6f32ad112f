"""Prompts that begin alike: what sharing their pages saves, under the adapter's identity alone.

Every request has the same long beginning, as a system prompt is, and an end of its own. A page is
shared among the requests of one adapter; those of another compute the same beginning again.
"""

import argparse
import asyncio
import itertools
import time
from typing import Any

import torch

from benchmarks.serve_worlds import Record, Shape, build_adapters, build_base, build_engine
from s2ft_ray.method import Adapter
from s2ft_ray.serving.engine import Engine
from s2ft_ray.serving.requests import AdapterKey, GenerationRequest, SamplingParams

SHAPE = Shape(width=512, layers=4, dtype=torch.float32)
NUM_ADAPTERS, NUM_REQUESTS, CLIENTS = 4, 64, 8
BEGINNING, OWN, NEW_TOKENS = 512, 16, 8


def measure(arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Answer the same requests with and without sharing; return the table and the numbers."""
    model = build_base(SHAPE, device=arguments.device)
    adapters = build_adapters(model, SHAPE, NUM_ADAPTERS)
    results: dict[str, list[dict[str, float]]] = {"each its own": [], "shared": []}
    for _ in range(arguments.rounds):
        for name, found in results.items():
            found.append(asyncio.run(_serve(model, adapters, shares=name == "shared")))
    best = {name: min(found, key=lambda it: it["seconds"]) for name, found in results.items()}
    return _render(best), results


async def _serve(model: Any, adapters: dict[AdapterKey, Adapter], shares: bool) -> dict[str, float]:
    engine = build_engine(
        model,
        adapters.__getitem__,
        slot_bytes=2**27,
        host_bytes=2**30,
        cache_tokens=CLIENTS * 2 * (BEGINNING + OWN + NEW_TOKENS),
        share_prefixes=shares,
    )
    numbers, keys = iter(range(NUM_REQUESTS)), list(adapters)
    records: list[Record] = []

    async def client() -> None:
        for number in numbers:
            records.append(await _ask(engine, number, keys[number % NUM_ADAPTERS]))

    try:
        for number, key in enumerate(keys):  # adapters are loaded, and beginnings seen, once
            await _ask(engine, NUM_REQUESTS + number, key)
        began = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(CLIENTS)))
        seconds = time.perf_counter() - began
    finally:
        await asyncio.to_thread(engine.stop)
    firsts = sorted(1000 * record.first_token_s for record in records)
    return {
        "seconds": seconds,
        "requests_per_s": NUM_REQUESTS / seconds,
        "first_median_ms": firsts[len(firsts) // 2],
        "first_p99_ms": firsts[int(0.99 * len(firsts))],
    }


async def _ask(engine: Engine, number: int, key: AdapterKey) -> Record:
    draw = torch.Generator().manual_seed(number)
    own = torch.randint(3, 700, (OWN,), generator=draw).tolist()
    beginning = itertools.islice(itertools.cycle(range(3, 700)), BEGINNING)
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    record = Record(time.perf_counter())
    prompt = (*beginning, *own)
    async for _ in engine.generate(GenerationRequest(f"r{number}", prompt, params, key)):
        record.arrivals.append(time.perf_counter())
    return record


def _render(best: dict[str, dict[str, float]]) -> str:
    apart, shared = best.values()
    gain = shared["requests_per_s"] / apart["requests_per_s"]
    lines = [
        f"{NUM_REQUESTS} requests of {CLIENTS} clients over {NUM_ADAPTERS} adapters, {BEGINNING}"
        f" tokens alike and {OWN} of their own, {NEW_TOKENS} new: {gain:.1f} times the requests/s",
        "",
        "| pages | requests/s | first token ms, median | p99 |",
        "|--|--:|--:|--:|",
    ]
    for name, it in best.items():
        cells = (
            f"{it['requests_per_s']:.1f} | {it['first_median_ms']:.0f} | {it['first_p99_ms']:.0f}"
        )
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)
