"""Measures what this project claims: ``python jobs/benchmark.py train | ray [options]``.

Each subcommand measures its contenders interleaved in one run, because a machine's speed drifts
from run to run, and reports ratios of their best.
"""

import argparse
import os
import warnings


def main() -> None:
    """Run one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    benchmarks = parser.add_subparsers(dest="benchmark", required=True)
    _add_train(benchmarks.add_parser("train", help="a training step against LoRA, DoRA and full"))
    _add_ray(benchmarks.add_parser("ray", help="one Ray Train worker against the plain loop"))
    arguments = parser.parse_args()
    # Imported here: training's memory and time need neither Ray nor MLflow.
    if arguments.benchmark == "train":
        from benchmarks import train as benchmark
    else:
        from benchmarks import ray_train as benchmark
    benchmark.run(arguments)


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", choices=["small", "7b"], default="small", help="model's shape")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", nargs="+", choices=["fp32", "bf16"], help="of the base")
    parser.add_argument("--tokens", nargs="+", metavar="BxT", help="rows x tokens of a step")
    parser.add_argument("--layers", type=int, help="fewer or more layers than the shape has")
    parser.add_argument("--width", type=int, help="hidden size; the rest is scaled with it")
    parser.add_argument("--attn", default="sdpa", help="attention implementation")
    parser.add_argument("--rounds", type=int, default=5)
    _add_shared(parser)


def _add_ray(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--steps", type=int, default=60, help="of one run")
    parser.add_argument("--rounds", type=int, default=2)
    _add_shared(parser)


def _add_shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", metavar="OUT", help="also write every number to this file")


if __name__ == "__main__":
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's start and stop lines
    # peft asks transformers for a name that transformers has replaced.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    main()
