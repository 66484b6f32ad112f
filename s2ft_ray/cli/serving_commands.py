"""serve, chat, promote, rollback, and adapters list | place | share: models that answer."""

import argparse
import json
import os
import sys
from typing import Any

from s2ft_ray.cli.clients import become_client, become_registry_client
from s2ft_ray.cli.table import print_table

_URL = "http://127.0.0.1:8000"


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands of this subject to the parser."""
    command = commands.add_parser("serve", help="serve a base and its adapters on this machine")
    command.add_argument(
        "--base",
        action="append",
        required=True,
        metavar="MODEL",
        help="a hub name, a folder, or s2ft://tiny; may be repeated",
    )
    command.add_argument("--port", type=_port, default=8000, help="of HTTP, on loopback")
    command.add_argument(
        "--no-auth", action="store_true", help="answer everybody on this machine, without a key"
    )
    command.set_defaults(run=_serve)

    adapters = commands.add_parser("adapters", help="what is loaded and used")
    actions = adapters.add_subparsers(metavar="ACTION", required=True)
    action = actions.add_parser("list", help="every adapter: its tier, bytes, last use")
    _add_url(action)
    action.add_argument("--json", action="store_true", help="the same facts for a program")
    action.set_defaults(run=_list_adapters)

    action = actions.add_parser("place", help="keep an adapter warm, pinned, or alone on its base")
    action.add_argument("model", metavar="NAME")
    action.add_argument(
        "placement",
        choices=("warm", "pinned", "dedicated", "free"),
        help="warm: loaded before it is asked for; pinned: never evicted; dedicated: in the base's"
        " weights, at no cost, and nothing else is served of that base; free: as it comes and goes",
    )
    action.add_argument("--alias", default="champion")
    action.set_defaults(run=_place)

    action = actions.add_parser("share", help="say which other tenants may call a model")
    action.add_argument("model", metavar="NAME")
    action.add_argument(
        "tenants",
        metavar="TENANT",
        nargs="*",
        help="these and no others; '*': all; none: its owner",
    )
    action.set_defaults(run=_share)

    command = commands.add_parser("chat", help="talk to a served model")
    command.add_argument("model", metavar="NAME", help="<tenant>.<name>[@alias|:version] or a base")
    _add_url(command)
    command.set_defaults(run=_chat)

    command = commands.add_parser("promote", help="make a version the one that answers")
    command.add_argument("model", metavar="NAME")
    command.add_argument("version", type=int, metavar="VERSION")
    command.add_argument("--alias", default="champion")
    command.set_defaults(run=_promote)

    command = commands.add_parser("rollback", help="go back to the version before the last promote")
    command.add_argument("model", metavar="NAME")
    command.add_argument("--alias", default="champion")
    command.set_defaults(run=_rollback)


def _add_url(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--url",
        default=os.environ.get("S2FT_URL", _URL),
        help=f"where the service is (default $S2FT_URL, else {_URL}); the key is $S2FT_API_KEY",
    )


def _port(text: str) -> int:
    if not text.isdecimal() or not 1024 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port from 1024 to 65535")
    return int(text)


def _serve(args: argparse.Namespace) -> int:
    from s2ft_ray.config import ModelConfig

    become_client()
    from s2ft_ray.bases import local_folder

    for base in args.base:  # a name that can't be is told now, not by a replica that fails
        local_folder(ModelConfig(name_or_path=base), weights=False)
    print("starting the service, about 20 s on an idle machine", file=sys.stderr)
    from s2ft_ray.serving.deployment import deploy, gpu_share
    from s2ft_ray.serving.settings import BaseSettings, ServingSettings

    # training asks Ray for this machine's cores, and gets them all the same while nobody calls
    num_gpus = gpu_share(len(args.base))
    bases = [
        BaseSettings(model=ModelConfig(name_or_path=base), num_cpus=0, num_gpus=num_gpus)
        for base in args.base
    ]
    settings = ServingSettings(
        bases=bases, no_auth=args.no_auth, tracking_uri=os.environ.get("MLFLOW_TRACKING_URI")
    )
    url = deploy(settings, args.port)
    print(f"{url}/v1 answers for {', '.join(base.model_id for base in bases)} and their adapters")
    if not args.no_auth:
        print("Keys:  s2ft keys create --tenant T")
    print("It ends with `s2ft down`.")
    return 0


def _list_adapters(args: argparse.Namespace) -> int:
    adapters = _ask(args.url, "/v1/adapters")["data"]
    if args.json:
        print(json.dumps(adapters, indent=2))
        return 0
    from datetime import UTC, datetime

    rows = []
    for adapter in adapters:
        last = adapter["last_used"]
        used = "-" if last is None else datetime.fromtimestamp(last, UTC).isoformat(" ", "seconds")
        size, rate = adapter["bytes"], adapter["requests_per_minute"]
        name, version, tier = adapter["name"], adapter["version"], adapter["tier"]
        counts = str(adapter["running"]), str(rate), adapter["placement"] or "-"
        where = adapter["base"], adapter["replica"] or "-"
        taken = "-" if size is None else f"{size:,}"
        rows.append((name, str(version), *where, tier, taken, used, *counts))
    header = "ADAPTER VERSION BASE REPLICA TIER BYTES LAST_USED RUNNING REQUESTS/MIN PLACEMENT"
    print_table([name.replace("_", " ") for name in header.split()], rows)
    return 0


def _chat(args: argparse.Namespace) -> int:
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return 0
        messages.append({"role": "user", "content": line})
        body = {"model": args.model, "messages": messages}
        answer = _ask(args.url, "/v1/chat/completions", body)["choices"][0]["message"]["content"]
        print(answer)
        messages.append({"role": "assistant", "content": answer})


def _promote(args: argparse.Namespace) -> int:
    become_registry_client()
    from s2ft_ray.registry import promote

    move = promote(args.model, args.version, args.alias)
    before = "" if move.before is None else f", was {move.before}"
    print(f"{move.name}@{move.alias} is version {move.version}{before}")
    return 0


def _place(args: argparse.Namespace) -> int:
    become_registry_client()
    from s2ft_ray.registry import place

    place(args.model, args.alias, None if args.placement == "free" else args.placement)
    print(f"{args.model}@{args.alias} is {args.placement}")
    return 0


def _share(args: argparse.Namespace) -> int:
    become_registry_client()
    from s2ft_ray.registry import share

    share(args.model, args.tenants)
    others = (
        f"shared with {', '.join(sorted(set(args.tenants)))}" if args.tenants else "its owner's"
    )
    print(f"{args.model} is {others}")
    return 0


def _rollback(args: argparse.Namespace) -> int:
    become_registry_client()
    from s2ft_ray.registry import rollback

    move = rollback(args.model, args.alias)
    print(f"{move.name}@{move.alias} is version {move.version} again, was {move.before}")
    return 0


def _ask(url: str, path: str, body: dict[str, Any] | None = None) -> Any:
    import urllib.error
    import urllib.request

    from s2ft_ray.errors import ConfigError, ServingError

    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("S2FT_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url.rstrip("/") + path, data, headers)
    try:
        with urllib.request.urlopen(request) as reply:
            return json.loads(reply.read())
    except urllib.error.HTTPError as error:
        with error:
            text = error.read().decode(errors="replace")
        kind = ConfigError if error.code < 500 else ServingError
        raise kind(f"{url}: {_message(text)}") from None
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise ServingError(f"{url}: no answer ({reason}); s2ft serve starts the service") from None


def _message(text: str) -> str:
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:300]
