"""Measures what this project claims: ``python jobs/benchmark.py train | ray | ... [options]``.

Each subcommand measures its contenders interleaved in one run, because a machine's speed drifts
from run to run, and reports ratios of their best.
"""

import argparse
import importlib
import os
import warnings


def main() -> None:
    """Run one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    subcommands = parser.add_subparsers(dest="benchmark", required=True)
    for name, (_, text, add_options) in BENCHMARKS.items():
        subcommand = subcommands.add_parser(name, help=text)
        add_options(subcommand)
        _add_shared(subcommand)
    arguments = parser.parse_args()
    # Imported here: training's memory and time need neither Ray nor MLflow.
    importlib.import_module(BENCHMARKS[arguments.benchmark][0]).run(arguments)


def _add_train(parser: argparse.ArgumentParser) -> None:
    shapes = ["small", "7b", "13b"]
    parser.add_argument("--config", choices=shapes, default="small", help="model's shape")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", nargs="+", choices=["fp32", "bf16"], help="of the base")
    parser.add_argument("--tokens", nargs="+", metavar="BxT", help="rows x tokens of a step")
    parser.add_argument("--layers", type=int, help="fewer or more layers than the shape has")
    parser.add_argument("--width", type=int, help="hidden size; the rest is scaled with it")
    parser.add_argument(
        "--size", nargs="+", choices=["10m", "57m", "214m"], help="sizes of the small shape"
    )
    parser.add_argument(
        "--batching",
        nargs="+",
        choices=["full", "padded", "packed"],
        default=["full"],
        help="equal rows, or rows of unequal length padded or packed",
    )
    parser.add_argument("--checkpointing", nargs="+", choices=["off", "on"], default=["off"])
    parser.add_argument("--attn", default="sdpa", help="attention implementation")
    parser.add_argument(
        "--kernels",
        choices=["plain", "liger", "compiled"],
        default="plain",
        help="everybody's: the model's own, Liger's, or layers by torch.compile",
    )
    parser.add_argument(
        "--graph", action="store_true", help="replay each step as one CUDA graph: no launches"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="TEXT", help="S2FT and who has one of these in its name"
    )
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: the process's, of one thread"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--results", metavar="FILE", help="keep the turns; the same file takes on more rounds"
    )


def _add_ray(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--steps", type=int, default=60, help="of one run")
    parser.add_argument("--rounds", type=int, default=2)


def _add_adapters(parser: argparse.ArgumentParser) -> None:
    widths = [1024, 2048, 4096, 8192, 16384, 32768]
    parser.add_argument("--widths", type=int, nargs="+", default=widths, help="of the layers")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the base")
    parser.add_argument("--rank", type=int, default=16, help="LoRA's; S2FT gets twice as many")
    parser.add_argument("--rounds", type=int, default=5)


def _add_forgetting(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bases", nargs="+", choices=["tiny", "stories260k"], help="by default all that are here"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=96, help="of one run")
    parser.add_argument(
        "--results",
        default="forgetting.jsonl",
        metavar="FILE",
        help="runs done so far; the same file goes on from them",
    )
    parser.add_argument("--figure", metavar="OUT", help="draw the fronts into this PNG")


def _add_sharding(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, default=4, help="processes of --threads each")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rows", type=int, default=8, help="of 128 tokens, of all workers")
    parser.add_argument("--steps", type=int, default=10, help="in each layout")
    parser.add_argument("--rounds", type=int, default=2)


def _add_checkpoints(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, default=1, help="processes of --threads each")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--steps", type=int, default=60, help="of one run")
    parser.add_argument("--every", type=int, default=5, help="steps between checkpoints")
    parser.add_argument("--rounds", type=int, default=3)


def _add_queue(parser: argparse.ArgumentParser) -> None:
    parts = ["month", "tick", "service"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--days", type=float, default=30, help="length of the simulated month")
    parser.add_argument("--tenants", type=int, default=20)
    parser.add_argument("--nodes", type=int, default=8, help="of 8 workers each")
    parser.add_argument("--seed", type=int, default=0, help="of the trace")
    sizes = [1000, 2500, 5000, 10000]
    parser.add_argument("--queued", type=int, nargs="+", default=sizes, help="for tick and service")
    parser.add_argument("--figure", metavar="OUT", help="draw the month into this PNG")


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parts = ["mixed", "layer", "zipf", "pressure", "prefix", "http", "soak", "swap"]
    parser.add_argument("--parts", nargs="+", choices=parts, help="by default all of the device")
    parser.add_argument("--dtype", nargs="+", choices=["fp32", "bf16"], default=["bf16", "fp32"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--width", type=int, default=2048, help="of most parts' base and layer")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32, help="that each request of `mixed` gets")
    parser.add_argument("--soak-s", type=float, default=300, help="seconds of `soak`")
    counts = [10, 100, 1000, 10_000]
    parser.add_argument("--adapters", type=int, nargs="+", default=counts, help="of `layer`")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: process's")
    parser.add_argument("--rounds", type=int, default=3)


def _add_shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", metavar="OUT", help="also write every number to this file")


# By name: the module whose ``run`` takes the arguments, the help, and what adds the options.
BENCHMARKS = {
    "train": ("benchmarks.train", "a training step against LoRA, DoRA and full", _add_train),
    "ray": ("benchmarks.ray_train", "one Ray Train worker against the plain loop", _add_ray),
    "adapters": (
        "benchmarks.adapters",
        "switching against LoRA's merge; fuse, load",
        _add_adapters,
    ),
    "sharding": ("benchmarks.sharding", "replicate, full and hybrid side by side", _add_sharding),
    "checkpoints": ("benchmarks.checkpoints", "what saving costs the steps", _add_checkpoints),
    "queue": ("benchmarks.queue", "a month of many tenants; the scheduler's own cost", _add_queue),
    "serve": ("benchmarks.serve", "adapters in one batch against the base and LoRA", _add_serve),
    "forgetting": ("benchmarks.forgetting", "the new task against the base's own", _add_forgetting),
}


if __name__ == "__main__":
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's start and stop lines
    # peft asks transformers for a name that transformers has replaced.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    main()
