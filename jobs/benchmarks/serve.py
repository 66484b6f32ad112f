"""Serving: what adapters cost beside the base alone, and beside LoRA on the same engine.

Parts: `mixed` (64 requests at once over 8 and 64 adapters), `layer` (one layer under 10 to 10,000
adapters), `zipf` (1,000 adapters by popularity against 5), `pressure` (the first token with twice
as many adapters as have room) call the engine directly. `http` (the deployed service beside its
engine), `soak` (100 streams for minutes), `swap` (a version that goes live under streams) bring the
service up, each a Ray of its own.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks import serve_http, serve_layer, serve_mixed, serve_swap, serve_tiers
from benchmarks.machine import describe_machine, load_warning

PARTS = {
    "mixed": serve_mixed.measure,
    "layer": serve_layer.measure,
    "zipf": serve_tiers.measure_zipf,
    "pressure": serve_tiers.measure_pressure,
    "http": serve_http.measure_http,
    "soak": serve_http.measure_soak,
    "swap": serve_swap.measure,
}


def run(arguments: argparse.Namespace) -> None:
    """Measure the parts that were asked for and print their tables."""
    torch.set_num_threads(arguments.threads)
    machine, warning = describe_machine(torch.device("cpu")), load_warning()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    if warning:
        print(warning)
    results: dict[str, Any] = {}
    for part in arguments.parts:
        with torch.no_grad():
            table, results[part] = PARTS[part](arguments)
        print(f"\n{table}", flush=True)
    if arguments.json:
        document = {"machine": machine, "warning": warning, "results": results}
        Path(arguments.json).write_text(json.dumps(document, indent=2), encoding="utf-8")
