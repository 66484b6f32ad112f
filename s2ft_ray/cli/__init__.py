"""The `s2ft` command: what an operator types.

Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted, 141 where nobody reads the output any
more. A fault is one line on stderr, never a traceback. One module a subject, each with
``add_commands``; what a subcommand needs is imported when it runs, so that `s2ft --help` is
instant.
"""

import argparse
import os
import select
import sys
from collections.abc import Sequence

from s2ft_ray.cli import (
    account_commands,
    adapter_commands,
    node_commands,
    queue_commands,
    run_commands,
    serving_commands,
)
from s2ft_ray.errors import S2FTError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; return its exit code."""
    args = _build_parser().parse_args(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
    except S2FTError as error:
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        if not _has_no_reader():
            raise
        return 141
    return code


def _has_no_reader() -> bool:
    """Say whether the output's reader has gone, as `head` does; what is left goes nowhere then."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if not any(events & select.POLLERR for _, events in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="s2ft",
        description="Fine-tune and serve large language models by structured sparsity, on Ray.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for subject in (
        node_commands,
        run_commands,
        queue_commands,
        adapter_commands,
        account_commands,
        serving_commands,
    ):
        subject.add_commands(commands)
    return parser
