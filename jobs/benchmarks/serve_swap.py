"""An alias that moves while it is streamed from: no fault, no mixture, and how long decoding stops.

A move is everything from the order to promote until the first stream of the new version, which no
replica has seen before: the look at the registry, the fetch, the checks on the replica, the switch.
Decoding's gaps in that time are compared with those of the quiet time before it, which is as long.
"""

import argparse
import asyncio
import itertools
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np
import torch

from benchmarks.serve_http import prompt
from benchmarks.serve_service import (
    Answer,
    Service,
    client_session,
    deployed,
    stream,
    whole,
)
from benchmarks.serve_worlds import Shape
from s2ft_ray.errors import ServingError

SWAPPED = "bench.swapped"
NUM_CLIENTS, NUM_PROMPTS = 16, 8
NEW_TOKENS = 24
NUM_MOVES = 6
QUIET_S = 4.0
SCALE = 0.2
"""Of the deltas: the versions' texts differ."""
STALL_AT_MOST_MS = 50.0
_MOVE_TIMEOUT_S = 60.0


@dataclass
class Load:
    """The streams so far, and when the alias moved."""

    answers: list[tuple[int, Answer]] = field(default_factory=list)
    """Each with its prompt's number."""
    moves: list[tuple[float, float]] = field(default_factory=list)
    is_over: bool = False

    def quiet(self) -> list[tuple[float, float]]:
        """Return the time before each move, as long as the move where there is so much."""
        spans, free_from = [], 0.0
        for began, ended in self.moves:
            spans.append((max(free_from, 2 * began - ended), began))
            free_from = ended
        return spans

    def gaps_ms(self, spans: list[tuple[float, float]]) -> list[float]:
        """Return the times between two events of a stream of which the later lies in a span."""
        return [
            1000 * (later - earlier)
            for _, answer in self.answers
            for (earlier, _), (later, _) in itertools.pairwise(answer.events)
            if any(began <= later <= ended for began, ended in spans)
        ]


def measure(arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Move the alias there and back under streams; return the table and the numbers."""
    shape = Shape(arguments.width, arguments.layers, torch.float32)
    names = [SWAPPED] * (NUM_MOVES + 1)
    with deployed(shape, arguments.threads, names, SCALE) as service:
        texts, load = asyncio.run(_swap(service))
    assert all(len(set(of.values())) == len(names) for of in texts), "two versions are alike"
    faults = [answer.fault for _, answer in load.answers if answer.fault]
    mixed = sum(
        not answer.fault
        and (
            len(answer.fingerprints) != 1
            or answer.text != texts[number][next(iter(answer.fingerprints))]
        )
        for number, answer in load.answers
    )
    gaps = {"quiet": load.gaps_ms(load.quiet()), "moving": load.gaps_ms(load.moves)}
    return _render(load, faults, mixed, gaps), {
        "answers": len(load.answers),
        "faults": faults,
        "mixed": mixed,
        "moves_s": [ended - began for began, ended in load.moves],
        "gaps_ms": gaps,
    }


async def _swap(service: Service) -> tuple[list[dict[str, str]], Load]:
    """Return what each version answers to each prompt, by fingerprint; and the load."""
    load = Load()
    async with client_session() as session:

        async def client(number: int) -> None:
            while not load.is_over:
                answer = await stream(session, service.url, SWAPPED, prompt(number), NEW_TOKENS)
                load.answers.append((number, answer))

        clients = [asyncio.create_task(client(i % NUM_PROMPTS)) for i in range(NUM_CLIENTS)]
        try:
            for version in range(1, NUM_MOVES + 1):  # the last one has the alias
                await asyncio.sleep(QUIET_S)
                load.moves.append(await _move(session, service, load, version))
            await asyncio.sleep(QUIET_S)
        finally:
            load.is_over = True
            await asyncio.gather(*clients)
        texts = [await _texts(session, service, number) for number in range(NUM_PROMPTS)]
    return texts, load


async def _move(
    session: aiohttp.ClientSession, service: Service, load: Load, version: int
) -> tuple[float, float]:
    """Promote a version; return when that began, and when the first stream of it did."""
    wanted = list(service.adapters)[version - 1].fingerprint
    began = time.perf_counter()
    body = {"version": version, "alias": "champion"}
    async with session.post(f"{service.url}/v1/models/{SWAPPED}/promote", json=body) as reply:
        if reply.status != 200:
            raise ServingError(f"{SWAPPED}: {reply.status} {await reply.text()}")
    while time.perf_counter() < began + _MOVE_TIMEOUT_S:
        new = [a.sent_at for _, a in load.answers if a.sent_at > began and wanted in a.fingerprints]
        if new:
            return began, min(new)
        await asyncio.sleep(0.05)
    raise ServingError(f"{SWAPPED}: version {version} takes no traffic")


async def _texts(session: aiohttp.ClientSession, service: Service, number: int) -> dict[str, str]:
    texts = {}
    for version, key in enumerate(service.adapters, start=1):
        model = f"{SWAPPED}:{version}"
        answer = await whole(session, service.url, model, prompt(number), NEW_TOKENS)
        assert answer["system_fingerprint"] == key.fingerprint
        texts[key.fingerprint] = answer["choices"][0]["text"]
    return texts


def _render(load: Load, faults: list[str], mixed: int, gaps: dict[str, list[float]]) -> str:
    # what holds all streams up at a move is more than a hundredth of its gaps; a maximum is chance
    stall = float(np.percentile(gaps["moving"], 99) - np.percentile(gaps["quiet"], 99))
    moves = [ended - began for began, ended in load.moves]
    lines = [
        f"{NUM_CLIENTS} streams, {len(moves)} moves of {min(moves):.1f} to {max(moves):.1f} s;"
        f" {len(load.answers):,} answers, {len(faults)} faults ({_verdict(not faults)} 0),"
        f" {mixed} mixed ({_verdict(not mixed)} 0); p99 of the gaps"
        f" {stall:+.0f} ms ({_verdict(stall <= STALL_AT_MOST_MS)} {STALL_AT_MOST_MS:.0f})",
        *(f"fault: {fault}" for fault in dict.fromkeys(faults[:5])),
        "",
        "| time between a stream's tokens | number | median ms | p99 | longest |",
        "|--|--:|--:|--:|--:|",
    ]
    for name, found in gaps.items():
        cells = [f"{np.percentile(found, share):.0f}" for share in (50, 99, 100)]
        lines.append(f"| {name} | {len(found):,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _verdict(is_met: bool) -> str:
    return "within" if is_met else "MISSES"
