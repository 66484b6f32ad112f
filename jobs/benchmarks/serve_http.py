"""The deployed service: its throughput beside its engine's own, and many streams for minutes."""

import argparse
import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import torch

from benchmarks.serve_service import Answer, Service, client_session, deployed, stream, whole
from benchmarks.serve_worlds import Shape, ask_all
from s2ft_ray.bases import load_tokenizer
from s2ft_ray.config import ModelConfig
from s2ft_ray.errors import ServingError
from s2ft_ray.serving.engine import Engine
from s2ft_ray.serving.requests import AdapterKey

NAMES = [f"bench.a{number}" for number in range(8)]
NUM_REQUESTS, NUM_STREAMS = 64, 100
PROMPT_TOKENS, SOAK_TOKENS = 16, 32
AT_LEAST = 0.90
"""Of the tokens/s of the engine that is called directly."""
GROWTH_AT_MOST = 0.02
"""Of the service's memory, from a fifth of the time to its end."""
_SAMPLE_S = 5.0


def measure_http(arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """64 requests at once over 8 adapters: to the engine, and over HTTP to the same engine."""
    shape = Shape(arguments.width, arguments.layers, torch.float32)
    with deployed(shape, arguments.threads, NAMES) as service:
        rates = asyncio.run(_take_turns(service, arguments.rounds, arguments.tokens))
    best = {name: max(found) for name, found in rates.items()}
    lines = [
        f"fp32, width {shape.width}, {shape.layers} layers; {NUM_REQUESTS} requests at once over"
        f" {len(NAMES)} adapters, {PROMPT_TOKENS} + {arguments.tokens} tokens",
        "",
        "| | tokens/s | of the engine's |",
        "|--|--:|--:|",
    ]
    for name, rate in best.items():
        share = rate / best["engine"]
        verdict = "" if name == "engine" else f" ({_verdict(share >= AT_LEAST)} {AT_LEAST:.2f})"
        lines.append(f"| {name} | {rate:.0f} | {share:.2f}{verdict} |")
    return "\n".join(lines), {"tokens_per_s": rates}


async def _take_turns(service: Service, rounds: int, new_tokens: int) -> dict[str, list[float]]:
    """Return the tokens/s of each way in each round but the first."""
    engine = Engine(
        service.model,
        load_tokenizer(ModelConfig()),
        service.adapters.__getitem__,
        slot_bytes=service.base.adapter_slot_bytes,
        host_bytes=service.base.adapter_host_bytes,
    )
    engine.start()
    keys = list(itertools.islice(itertools.cycle(service.adapters), NUM_REQUESTS))
    rates: dict[str, list[float]] = {"engine": [], "HTTP, whole": [], "HTTP, streams": []}
    try:
        async with client_session() as session:
            ways = {
                "engine": lambda: _ask_engine(engine, keys, new_tokens),
                "HTTP, whole": lambda: _ask_whole(session, service, keys, new_tokens),
                "HTTP, streams": lambda: _ask_streams(session, service, keys, new_tokens),
            }
            for number in range(rounds + 1):
                for name, way in ways.items():
                    rate = await _rate(way)
                    if number:  # in the first one adapters are loaded
                        rates[name].append(rate)
    finally:
        await asyncio.to_thread(engine.stop)
    return rates


async def _rate(way: Callable[[], Awaitable[int]]) -> float:
    began = time.perf_counter()
    num_tokens = await way()
    return num_tokens / (time.perf_counter() - began)


async def _ask_engine(engine: Engine, keys: list[AdapterKey], new_tokens: int) -> int:
    records = await ask_all(engine, keys, PROMPT_TOKENS, new_tokens, time.perf_counter)
    return sum(len(record.arrivals) for record in records)


async def _ask_whole(
    session: aiohttp.ClientSession, service: Service, keys: list[AdapterKey], new_tokens: int
) -> int:
    answers = await asyncio.gather(
        *(
            whole(session, service.url, key.name, prompt(number), new_tokens)
            for number, key in enumerate(keys)
        )
    )
    return sum(answer["usage"]["completion_tokens"] for answer in answers)


async def _ask_streams(
    session: aiohttp.ClientSession, service: Service, keys: list[AdapterKey], new_tokens: int
) -> int:
    answers = await asyncio.gather(
        *(
            stream(session, service.url, key.name, prompt(number), new_tokens)
            for number, key in enumerate(keys)
        )
    )
    for answer in answers:
        if answer.fault:
            raise ServingError(answer.fault)
    return sum(answer.num_tokens for answer in answers)


@dataclass
class Soak:
    """What came of the streams, and the memory of the service's processes over the time."""

    answers: int = 0
    tokens: int = 0
    faults: list[str] = field(default_factory=list)
    samples: list[dict[str, int]] = field(default_factory=list)

    def take(self, answer: Answer, wanted: int) -> None:
        """Count one stream."""
        self.answers += 1
        self.tokens += answer.num_tokens
        if answer.fault is None and answer.num_tokens != wanted:
            answer.fault = f"{answer.num_tokens} tokens of {wanted}"
        if answer.fault is not None:
            self.faults.append(answer.fault)


def measure_soak(arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """100 streams at any time for minutes: no error, flat memory."""
    shape = Shape(arguments.width, arguments.layers, torch.float32)
    with deployed(shape, arguments.threads, NAMES) as service:
        soak = asyncio.run(_soak(service, arguments.soak_s))
    return _render(soak, arguments.soak_s), {
        "answers": soak.answers,
        "tokens": soak.tokens,
        "faults": soak.faults,
        "resident_bytes": soak.samples,
    }


async def _soak(service: Service, seconds: float) -> Soak:
    soak = Soak()
    names = itertools.cycle(key.name for key in service.adapters)
    numbers = itertools.count()
    ends_at = time.monotonic() + seconds

    async def client(session: aiohttp.ClientSession) -> None:
        while time.monotonic() < ends_at:
            tokens = prompt(next(numbers))
            soak.take(
                await stream(session, service.url, next(names), tokens, SOAK_TOKENS), SOAK_TOKENS
            )

    async def watch() -> None:
        while True:
            soak.samples.append(await asyncio.to_thread(service.resident_bytes))
            await asyncio.sleep(_SAMPLE_S)

    watching = asyncio.create_task(watch())
    async with client_session() as session:
        await asyncio.gather(*(client(session) for _ in range(NUM_STREAMS)))
    watching.cancel()
    return soak


def _render(soak: Soak, seconds: float) -> str:
    mib = 2**20
    warm, last = soak.samples[len(soak.samples) // 5], soak.samples[-1]
    growth = sum(last.values()) / sum(warm.values()) - 1
    lines = [
        f"{NUM_STREAMS} streams for {seconds:.0f} s: {soak.answers:,} answers,"
        f" {soak.tokens / seconds:.0f} tokens/s, {len(soak.faults)} faults"
        f" ({_verdict(not soak.faults)} 0); memory {growth:+.1%}"
        f" ({_verdict(growth <= GROWTH_AT_MOST)} {GROWTH_AT_MOST:.0%})",
        *(f"fault: {fault}" for fault in dict.fromkeys(soak.faults[:5])),
        "",
        "| process | MiB at a fifth of the time | at the end |",
        "|--|--:|--:|",
    ]
    for name in last:
        lines.append(f"| {name} | {warm.get(name, 0) / mib:.0f} | {last[name] / mib:.0f} |")
    return "\n".join(lines)


def prompt(number: int) -> list[int]:
    """Return a prompt that no other number has."""
    draw = torch.Generator().manual_seed(number)
    return torch.randint(10, 200, (PROMPT_TOKENS,), generator=draw).tolist()


def _verdict(is_met: bool) -> str:
    return "within" if is_met else "MISSES"
