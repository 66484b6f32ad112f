"""check: what can be said of a run before it starts."""

import argparse
import sys


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands of this subject to the parser."""
    command = commands.add_parser(
        "check", help="validate a run's configuration and data, and estimate it, without training"
    )
    command.add_argument("--config", required=True, metavar="FILE", help="the run, as YAML")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="a value of the configuration, e.g. optim.lr=1e-3; may be repeated",
    )
    command.set_defaults(run=_check)


def _check(args: argparse.Namespace) -> int:
    from s2ft_ray.config import load_config

    config = load_config(args.config, args.overrides)
    # Only now, so that a typo is told without torch.
    from s2ft_ray.training.plan import describe_first_row, plan_run

    plan = plan_run(config)
    print(plan.describe())
    print(f"first row   {describe_first_row(plan, color=sys.stdout.isatty())}")
    return 0
