"""``jobs/benchmark.py train``: a training step of S2FT against the other ways of fine-tuning.

Invariant: a round gives every contender a turn, a turn begins with a fresh model, and the table
holds the ratios of the minima over all rounds.
"""

import argparse
import gc
import itertools
import json
import random
import sys
from dataclasses import asdict, dataclass, field
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
from benchmarks.machine import describe_machine, load_warning
from benchmarks.measure import TrainingStep
from benchmarks.targets import Target, targets
from s2ft_ray.config import S2FTConfig
from s2ft_ray.data import pack_rows
from s2ft_ray.data.batches import MicroBatch, Sample, build_micro_batch
from s2ft_ray.method import convert

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# A third of the small shape's work would be a vocabulary of 32,000, the same for everybody.
VOCAB_SIZES = {"small": 4096, "7b": 32000}
# Heads, key-value heads, size of a head, intermediate channels.
SHAPES = {"small": (12, 4, 64, 2048), "7b": (32, 32, 128, 11008)}
DEFAULT_LAYERS = {"small": 8, "7b": 32}
# Layers and width of the small shape at other sizes, by their parameters.
SIZES = {"10m": (4, 384), "57m": (8, 768), "214m": (8, 1536)}
STEPS_PER_TURN = 2
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """One table: a model, its type, and the batch."""

    model_config: LlamaConfig
    dtype: str
    rows: int
    tokens: int
    device: str
    attn: str
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
        return ", ".join(parts)


@dataclass
class Result:
    """What was measured of one contender."""

    name: str
    num_trainable: int
    kept_bytes: int | None
    """None under activation checkpointing."""
    peak_bytes: int
    seconds: list[float] = field(default_factory=list)

    @property
    def best(self) -> float:
        return min(self.seconds)


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
        results = measure(case, arguments.rounds)
        print(f"\n{case.name}: best of {arguments.rounds} rounds of {STEPS_PER_TURN} steps")
        aims = {}
        if case.is_standard:
            aims = targets(arguments.config, case.dtype, case.rows, case.tokens)
        print(render(results, build_batch(case).num_tokens, aims), flush=True)
        tables.append(
            {
                "case": case.name,
                "model": case.model_config.to_diff_dict(),
                "results": [_to_json(result, results[0]) for result in results],
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
    large = arguments.config == "7b"
    dtypes = arguments.dtype or (["bf16"] if large else ["fp32", "bf16"])
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


def measure(case: Case, rounds: int) -> list[Result]:
    """Measure all contenders; S2FT's result comes first."""
    size = convert(_fresh_model(case), S2FTConfig()).num_trainable
    everyone = contenders(DTYPES[case.dtype])
    _tell(f"{case.name}: memory of {len(everyone)} contenders")
    results = [_measure_memory(case, contender, size) for contender in everyone]
    for number in range(1, rounds + 1):
        _tell(f"{case.name}: round {number} of {rounds}")
        for contender, result in zip(everyone, results, strict=True):
            result.seconds += _take_turn(case, contender, size)
    return results


def render(results: list[Result], tokens: int, aims: dict[str, Target]) -> str:
    """Return the table: what each contender needs, and S2FT's need divided by it."""
    own = results[0]
    lines = [
        "| | trainable | step ms | tokens/s | peak MiB | kept MiB | S2FT/it: time | peak | kept |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for it in results:
        aim = aims.get(it.name, Target())
        cells = [
            it.name,
            f"{it.num_trainable:,}",
            f"{it.best * 1000:.1f}",
            f"{tokens / it.best:,.0f}",
            f"{it.peak_bytes / MIB:.1f}",
            "-" if it.kept_bytes is None else f"{it.kept_bytes / MIB:.1f}",
            _ratio(own.best / it.best, aim.seconds),
            _ratio(own.peak_bytes / it.peak_bytes, aim.peak_bytes),
            "-" if (kept := _kept_ratio(own, it)) is None else _ratio(kept, aim.kept_bytes),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _tell(progress: str) -> None:
    print(progress, file=sys.stderr, flush=True)


def _ratio(ratio: float, most: float | None) -> str:
    if most is None:
        return f"{ratio:.3f}"
    return f"{ratio:.3f} ({'within' if ratio <= most else 'MISSES'} {most:.2f})"


def _kept_ratio(own: Result, it: Result) -> float | None:
    if own.kept_bytes is None or it.kept_bytes is None:
        return None
    return own.kept_bytes / it.kept_bytes


def _to_json(it: Result, own: Result) -> dict[str, object]:
    return {
        **asdict(it),
        "best_seconds": it.best,
        "s2ft_ratio": {
            "seconds": own.best / it.best,
            "peak_bytes": own.peak_bytes / it.peak_bytes,
            "kept_bytes": _kept_ratio(own, it),
        },
    }


def _measure_memory(case: Case, contender: Contender, size: int) -> Result:
    step = _prepare(case, contender, size)
    peak = step.peak_bytes()  # first: it counts the optimizer's state as it is made
    trainable = sum(parameter.numel() for parameter in trainable_parameters(step.model))
    kept = None if case.checkpointing else step.kept_bytes()
    result = Result(contender.name, trainable, kept, peak)
    del step
    _free()
    return result


def _take_turn(case: Case, contender: Contender, size: int) -> list[float]:
    step = _prepare(case, contender, size)
    step.time()  # makes the optimizer's state and warms the caches
    seconds = [step.time() for _ in range(STEPS_PER_TURN)]
    del step
    _free()
    return seconds


def _prepare(case: Case, contender: Contender, size: int) -> TrainingStep:
    model = contender.attach(_fresh_model(case), size)
    batch = build_batch(case)
    inputs: dict[str, Any] = {"input_ids": batch.input_ids}
    if case.batching != "full":
        inputs = batch.model_inputs()
    return TrainingStep(model, build_optimizer(model), {**inputs, "labels": batch.labels})


def _fresh_model(case: Case) -> PreTrainedModel:
    dtype, device = DTYPES[case.dtype], torch.device(case.device)
    return build_model(case.model_config, device, dtype, case.attn, case.checkpointing)


def _free() -> None:
    gc.collect()  # a model and its hooks hold each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
