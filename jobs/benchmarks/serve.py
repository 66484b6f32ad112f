"""Serving: what adapters cost beside the base alone, and beside LoRA on the same engine.

Parts: `mixed` (64 requests at once over 8 and 64 adapters), `layer` (one layer under 10 to 10,000
adapters), `zipf` (1,000 adapters by popularity against 5), `pressure` (the first token with twice
as many adapters as have room), `prefix` (prompts that begin alike, with pages shared or not) call
the engine directly, on either device and without Ray. `http` (the deployed service beside its
engine), `soak` (100 streams for minutes), `swap` (a version that goes live under streams) bring the
service up on the CPU, each a Ray of its own.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe_machine, load_warning

# By name: the module and its function. Each is imported when it is its turn: see `run`.
PARTS = {
    "mixed": ("benchmarks.serve_mixed", "measure"),
    "layer": ("benchmarks.serve_layer", "measure"),
    "zipf": ("benchmarks.serve_tiers", "measure_zipf"),
    "pressure": ("benchmarks.serve_tiers", "measure_pressure"),
    "prefix": ("benchmarks.serve_prefix", "measure"),
    "http": ("benchmarks.serve_http", "measure_http"),
    "soak": ("benchmarks.serve_http", "measure_soak"),
    "swap": ("benchmarks.serve_swap", "measure"),
}
DEPLOYED = ("http", "soak", "swap")


def run(arguments: argparse.Namespace) -> None:
    """Measure the parts that were asked for and print their tables."""
    device = torch.device(arguments.device)
    parts = arguments.parts or [it for it in PARTS if device.type == "cpu" or it not in DEPLOYED]
    deployed = [part for part in parts if part in DEPLOYED]
    if device.type == "cuda" and deployed:
        sys.exit(f"--device cuda: no {', '.join(deployed)}: they deploy the service on the CPU")
    torch.set_num_threads(arguments.threads)
    machine, warning = describe_machine(device), load_warning()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    if warning:
        print(warning)
    results: dict[str, Any] = {}
    for part in parts:
        module, function = PARTS[part]
        # Imported here: what calls the engine directly runs where there is no Ray.
        measure = getattr(importlib.import_module(module), function)
        with torch.no_grad():
            table, results[part] = measure(arguments)
        print(f"\n{table}", flush=True)
    if arguments.json:
        document = {"machine": machine, "warning": warning, "results": results}
        Path(arguments.json).write_text(json.dumps(document, indent=2), encoding="utf-8")
