"""up, down, status: the services of one machine."""

import argparse
import json
import sys
from typing import TYPE_CHECKING

from s2ft_ray.cli.table import print_table

if TYPE_CHECKING:
    from s2ft_ray.node import NodeStatus


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands of this subject to the parser."""
    command = commands.add_parser(
        "up", help="start this machine's Ray head, MLflow server and scheduler"
    )
    command.add_argument(
        "--port-base",
        type=int,
        metavar="PORT",
        help="first of the 500 ports that the node takes; default: the home's last, else the"
        " first free from 8600",
    )
    command.add_argument(
        "--num-cpus",
        type=_positive,
        metavar="N",
        help="CPUs that Ray hands out; default: the machine's cores",
    )
    command.set_defaults(run=_up)

    command = commands.add_parser("down", help="end what `s2ft up` started, and nothing else")
    command.set_defaults(run=_down)

    command = commands.add_parser("status", help="show the services of this machine")
    form = command.add_mutually_exclusive_group()
    form.add_argument(
        "--env", action="store_true", help="KEY=VALUE lines that make a shell a client"
    )
    form.add_argument("--json", action="store_true", help="the same facts for a program")
    command.set_defaults(run=_status)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _up(args: argparse.Namespace) -> int:
    from s2ft_ray import node
    from s2ft_ray.config import s2ft_home

    if not node.status(s2ft_home()).is_up:
        print("starting Ray and MLflow, about 10 s on an idle machine", file=sys.stderr)
    status = node.up(s2ft_home(), port_base=args.port_base, num_cpus=args.num_cpus)
    _print_services(status)
    print('\nA shell becomes a client by:  set -a; eval "$(s2ft status --env)"; set +a')
    print(f"The Ray dashboard asks for the token in {status.env['RAY_AUTH_TOKEN_PATH']}")
    print("To end all this:  s2ft down")
    return 0 if status.is_up else 1


def _down(_: argparse.Namespace) -> int:
    from s2ft_ray import node
    from s2ft_ray.config import s2ft_home

    ended = node.down(s2ft_home())
    print(f"ended: {', '.join(ended)}" if ended else f"nothing is up in {s2ft_home()}")
    return 0


def _status(args: argparse.Namespace) -> int:
    from s2ft_ray import node
    from s2ft_ray.config import s2ft_home

    status = node.status(s2ft_home())
    if args.json:
        print(json.dumps(status.to_json(), indent=2))
    elif args.env:
        _print_env(status)
    else:
        _print_services(status)
    return 0 if status.is_up else 1


def _print_env(status: "NodeStatus") -> None:
    import shlex

    if not status.env:
        print(f"error: nothing is up in {status.home}; s2ft up starts it", file=sys.stderr)
    for key, value in status.env.items():
        print(f"{key}={shlex.quote(value)}")


def _print_services(status: "NodeStatus") -> None:
    rows = []
    for service in status.services:
        pid = "-" if service.pid is None else str(service.pid)
        rows.append((service.name, service.state, service.address or "-", pid, str(service.log)))
    print_table(("SERVICE", "STATE", "ADDRESS", "PID", "LOG"), rows)
