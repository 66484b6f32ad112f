"""``jobs/benchmark.py train``: a training step of S2FT against the other ways of fine-tuning.

Invariant: a round gives every contender a turn, a turn begins with a fresh model, and the table
holds the ratios of the minima over all rounds. With ``--results`` the turns are kept, so that the
rounds can be spread over several calls.
"""

import argparse
import gc
import itertools
import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedModel

from benchmarks.contenders import (
    Contender,
    build_model,
    build_optimizer,
    contenders,
    trainable_parameters,
)
from benchmarks.kernels import Kernels, use_kernels
from benchmarks.machine import OtherWork, describe_machine, load_warning, multiplies_bf16
from benchmarks.measure import CLOCKS, Clock, TrainingStep
from benchmarks.targets import targets
from benchmarks.turns import Result, Turn, TurnFile, as_document, describe_rounds, render
from s2ft_ray.config import S2FTConfig
from s2ft_ray.data import pack_rows
from s2ft_ray.data.batches import MicroBatch, Sample, build_micro_batch
from s2ft_ray.method import convert

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# A third of the small shape's work would be a vocabulary of 32,000, the same for everybody.
VOCAB_SIZES = {"small": 4096, "7b": 32000, "13b": 32000}
# Heads, key-value heads, size of a head, intermediate channels. Large: LLaMA-2's.
SHAPES = {
    "small": (12, 4, 64, 2048),
    "7b": (32, 32, 128, 11008),
    "13b": (40, 40, 128, 13824),
}
DEFAULT_LAYERS = {"small": 8, "7b": 32, "13b": 40}
# Layers and width of the small shape at other sizes, by their parameters.
SIZES = {"10m": (4, 384), "57m": (8, 768), "214m": (8, 1536)}
# Steps of a turn that warm up, and that count. A GPU's are short beside the model's making.
STEPS = {"cpu": (1, 2), "cuda": (3, 10)}


@dataclass(frozen=True)
class Case:
    """One table: a model, its type, and the batch."""

    model_config: LlamaConfig
    dtype: str
    rows: int
    tokens: int
    device: str
    attn: str
    kernels: Kernels = "plain"
    is_graph: bool = False
    """Whether a step is replayed as one CUDA graph."""
    batching: str = "full"
    """How rows of unequal length share a batch ("padded", "packed"), or "full": equal rows."""
    checkpointing: bool = False
    is_standard: bool = False
    """Of the named shape, unchanged, with full rows: what the targets are for."""

    @property
    def name(self) -> str:
        parts = [self.dtype, f"{self.rows} x {self.tokens} tokens"]
        if self.batching != "full":
            parts.append(f"{self.batching} from rows of unequal length")
        if self.checkpointing:
            parts.append("activation checkpointing")
        if self.kernels != "plain":
            parts.append(f"{self.kernels} kernels")
        if self.is_graph:
            parts.append("one CUDA graph")
        return ", ".join(parts)

    def to_document(self) -> dict[str, Any]:
        """Return all that decides what a step of this case costs on a machine."""
        return {
            "case": self.name,
            "model": self.model_config.to_diff_dict(),
            "device": self.device,
            "attn": self.attn,
        }


def run(arguments: argparse.Namespace) -> None:
    """Measure every case and print its table."""
    torch.set_num_threads(arguments.threads)
    machine, warning = describe_machine(torch.device(arguments.device)), load_warning()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    if warning:
        print(warning, flush=True)
    tables = []
    described = ""
    for case in build_cases(arguments):
        if (model := describe_model(case.model_config, case.attn)) != described:
            print(f"\n{model}")
            described = model
        path = Path(arguments.results) if arguments.results else None
        file = TurnFile(path, case.to_document(), {**machine, "clock": arguments.clock})
        results = measure(case, file, arguments)
        print(f"\n{case.name}: {describe_rounds(results)}")
        aims = {}
        if case.is_standard:
            aims = targets(arguments.config, case.dtype, case.rows, case.tokens)
        print(render(results, build_batch(case).num_tokens, aims), flush=True)
        tables.append(
            {
                "case": case.name,
                "model": case.model_config.to_diff_dict(),
                "results": [as_document(it, results[0]) for it in results],
            }
        )
    if arguments.json:
        document = {
            "machine": machine,
            "warning": warning,
            "attn": arguments.attn,
            "rounds": arguments.rounds,
            "tables": tables,
        }
        Path(arguments.json).write_text(json.dumps(document, indent=2), encoding="utf-8")


def build_config(shape: str, layers: int | None, width: int | None) -> LlamaConfig:
    """Return a Llama of the named shape; another width keeps the size of a head."""
    heads, kv_heads, head_dim, intermediate = SHAPES[shape]
    default_width = heads * head_dim
    width = width or default_width
    if width % (heads // kv_heads * head_dim):
        raise SystemExit(f"--width {width}: no multiple of {heads // kv_heads * head_dim}")
    return LlamaConfig(
        vocab_size=VOCAB_SIZES[shape],
        hidden_size=width,
        intermediate_size=intermediate * width // default_width,
        num_hidden_layers=layers or DEFAULT_LAYERS[shape],
        num_attention_heads=width // head_dim,
        num_key_value_heads=width // head_dim * kv_heads // heads,
        head_dim=head_dim,
        use_cache=False,
    )


def describe_model(config: LlamaConfig, attn: str) -> str:
    """Return the model's shape in one line."""
    return (
        f"Llama of {config.num_hidden_layers} layers, {config.hidden_size} wide,"
        f" {config.num_attention_heads} heads over {config.num_key_value_heads} key-value heads,"
        f" {config.intermediate_size} channels, vocabulary {config.vocab_size}, {attn} attention,"
        " random weights"
    )


def build_cases(arguments: argparse.Namespace) -> list[Case]:
    """Return the cases asked for; by default those of the shape."""
    if arguments.graph and (arguments.device == "cpu" or arguments.kernels != "plain"):
        raise SystemExit("--graph: takes --device cuda and plain kernels")
    large = arguments.config != "small"
    dtypes = arguments.dtype or (["bf16"] if large else ["fp32", "bf16"])
    if not arguments.dtype and not multiplies_bf16(torch.device(arguments.device)):
        print("no bf16: this CPU hasn't the instructions for it; --dtype bf16 measures it anyway")
        dtypes = ["fp32"]
    batches = arguments.tokens or (["1x512", "2x512", "1x1024", "2x1024"] if large else ["4x256"])
    shapes = [(arguments.layers, arguments.width)]
    if arguments.size:
        shapes = [SIZES[size] for size in arguments.size]
    cases = []
    for layers, width in shapes:
        model_config = build_config(arguments.config, layers, width)
        for dtype, batch, batching, checkpointing in itertools.product(
            dtypes, batches, arguments.batching, arguments.checkpointing
        ):
            rows, tokens = (int(part) for part in batch.split("x"))
            cases.append(
                Case(
                    model_config,
                    dtype,
                    rows,
                    tokens,
                    arguments.device,
                    arguments.attn,
                    arguments.kernels,
                    arguments.graph,
                    batching,
                    checkpointing == "on",
                    is_standard=(layers, width, batching, checkpointing)
                    == (None, None, "full", "off"),
                )
            )
    return cases


def build_batch(case: Case) -> MicroBatch:
    """Return random rows: `rows` full ones, or twice as many of 1/8 to 7/8 of `tokens`.

    Unequal rows come padded to the longest, or packed into sequences of `tokens`.
    """
    rng = random.Random(1)
    vocab_size, limit = case.model_config.vocab_size, case.tokens
    lengths = [limit] * case.rows
    if case.batching != "full":
        lengths = [rng.randint(limit // 8, limit * 7 // 8) for _ in range(2 * case.rows)]
    samples = [
        Sample([rng.randrange(vocab_size) for _ in range(length)], [True] * length, line)
        for line, length in enumerate(lengths)
    ]
    places = [[index] for index in range(len(samples))]
    if case.batching == "packed":
        places = pack_rows(lengths, limit, seed=0)
    sequences = [[samples[index] for index in place] for place in places]
    return build_micro_batch(sequences, pad_id=0).to(case.device)


def measure(case: Case, file: TurnFile, arguments: argparse.Namespace) -> list[Result]:
    """Take more rounds of S2FT and the contenders whose name has a text of `only` in it.

    Returns what the file has now, S2FT's result first; contenders without a turn are left out.
    """
    rounds, clock = arguments.rounds, CLOCKS[arguments.clock]
    size = convert(_fresh_model(case), S2FTConfig()).num_trainable
    everyone = contenders(DTYPES[case.dtype])
    chosen = [everyone[0], *(it for it in everyone[1:] if _is_chosen(it.name, arguments.only))]
    results = file.read()
    for contender in chosen:
        if rounds and contender.name not in results:
            _tell(f"{case.name}: memory of {contender.name}")
            results[contender.name] = _measure_memory(case, contender, size)
            file.add_memory(results[contender.name])
    for number in range(1, rounds + 1):
        _tell(f"{case.name}: round {number} of {rounds}")
        at = time.time_ns()
        for contender in chosen:
            turn = _take_turn(case, contender, size, at, clock)
            results[contender.name].turns.append(turn)
            file.add_turn(contender.name, turn)
    measured = [results[it.name] for it in everyone if it.name in results]
    if not any(it.turns for it in measured):
        raise SystemExit(f"{case.name}: no turn is there yet; ask for --rounds")
    return [it for it in measured if it.turns]


def _is_chosen(name: str, only: list[str] | None) -> bool:
    return only is None or any(text in name for text in only)


def _tell(progress: str) -> None:
    print(progress, file=sys.stderr, flush=True)


def _measure_memory(case: Case, contender: Contender, size: int) -> Result:
    step = _prepare(case, contender, size)
    peak = step.peak_bytes()  # first: it counts the optimizer's state as it is made
    trainable = sum(parameter.numel() for parameter in trainable_parameters(step.model))
    # No hook sees what activation checkpointing or a compiled layer keeps.
    hidden = case.checkpointing or case.kernels == "compiled"
    kept = None if hidden else step.kept_bytes()
    result = Result(contender.name, trainable, kept, peak)
    del step
    _free()
    return result


def _take_turn(case: Case, contender: Contender, size: int, at: int, clock: Clock) -> Turn:
    step = _prepare(case, contender, size)
    num_warmup, num_timed = STEPS[case.device]
    for _ in range(num_warmup):  # makes the optimizer's state and warms the caches
        step.run()
    other_work = OtherWork()
    run = step.capture() if case.is_graph else None
    seconds = [step.time(clock, run) for _ in range(num_timed)]
    others = other_work.share()
    del step, run
    _free()
    return Turn(at, seconds, others)


def _prepare(case: Case, contender: Contender, size: int) -> TrainingStep:
    plain = _fresh_model(case)
    model = contender.attach(plain, size)
    use_kernels(plain, case.kernels)
    batch = build_batch(case)
    inputs: dict[str, Any] = {"input_ids": batch.input_ids}
    if case.batching != "full":
        inputs = batch.model_inputs()
    optimizer = build_optimizer(model, is_captured=case.is_graph)
    return TrainingStep(model, optimizer, {**inputs, "labels": batch.labels})


def _fresh_model(case: Case) -> PreTrainedModel:
    dtype, device = DTYPES[case.dtype], torch.device(case.device)
    return build_model(case.model_config, device, dtype, case.attn, case.checkpointing)


def _free() -> None:
    gc.collect()  # a model and its hooks hold each other
    if torch.cuda.is_available():
        torch._C._cuda_clearCublasWorkspaces()  # each captured stream left some
        torch.cuda.empty_cache()
