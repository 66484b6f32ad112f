"""Answer test rows with a base and with its registered adapter, and score the answers.

    python jobs/evaluate.py acme.support-bot@champion --data tickets_test.jsonl --show 3
    python jobs/evaluate.py acme.math --suite llm-adapters --data test_gsm8k.jsonl AddSub/test.json

`exact` compares base and adapter side by side: a row is of any of the training formats, its
answer is right if it equals the row's own, surrounding space aside; rows with a key ``skill`` are
counted by it. `llm-adapters` scores the arithmetic and commonsense test sets as that project's
own evaluation does, goes on where it was interrupted, and logs to MLflow.
"""

import argparse
import sys
from pathlib import Path

from s2ft_ray.errors import S2FTError


def main(argv: list[str] | None = None) -> int:
    """Evaluate as the command line says; return the exit code."""
    args = _parser().parse_args(argv)
    # Imported here: a mistake in the command is told before torch and MLflow are loaded.
    try:
        if args.suite == "exact":
            from evaluation import exact

            exact.run(args)
        else:
            from evaluation import suite

            suite.run(args)
    except S2FTError as error:
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr)
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "adapter",
        nargs="?",
        help="<tenant>.<name>[@alias | :version], or an adapter's folder",
    )
    parser.add_argument("--suite", choices=["exact", "llm-adapters"], default="exact")
    parser.add_argument(
        "--data", type=Path, nargs="+", required=True, help="JSONL (llm-adapters: or JSON) files"
    )
    parser.add_argument("--batch-size", type=int, help="prompts at once (exact 64, else 16)")
    parser.add_argument(
        "--max-new-tokens", type=int, help="exact: 64; llm-adapters: 256 and 32, as its own"
    )
    exact = parser.add_argument_group("exact")
    exact.add_argument("--show", type=int, default=4, help="answers to print from the first file")
    exact.add_argument("--json", type=Path, help="write every answer and the accuracies here")
    suite = parser.add_argument_group("llm-adapters")
    suite.add_argument("--base", help="a base alone, in the place of an adapter")
    suite.add_argument("--num-beams", type=int, help="of the beam search (4, as its own)")
    suite.add_argument(
        "--results", type=Path, help="rows scored so far; the same file goes on from them"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
