"""export, fuse, register, inspect: what can be done with an adapter that is trained.

An adapter is named by its folder or as it is registered: ``<tenant>.<name>``, ``...@<alias>``,
``...:<version>``.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from s2ft_ray.cli.clients import become_registry_client
from s2ft_ray.errors import AdapterError, ConfigError

if TYPE_CHECKING:
    from s2ft_ray.method import Adapter
    from s2ft_ray.registry import LocatedAdapter

_NAMES = "an adapter's folder, or <tenant>.<name>[:version|@alias]"


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands of this subject to the parser."""
    command = commands.add_parser(
        "export", help="write an adapter as LoRA for other servers, or merged into its base"
    )
    command.add_argument("adapter", metavar="ADAPTER", help=_NAMES)
    command.add_argument("--format", required=True, choices=["peft", "merged"])
    command.add_argument("--out", required=True, type=Path, metavar="DIR", help="a new folder")
    command.add_argument(
        "--uniform-rank",
        action="store_true",
        help="peft: one rank for all modules, for consumers that ignore rank_pattern",
    )
    command.add_argument(
        "--base",
        metavar="MODEL",
        help="merged: the base's folder or name; default: the one that the adapter names",
    )
    _add_json(command)
    command.set_defaults(run=_export)

    command = commands.add_parser("fuse", help="make one adapter of several of the same base")
    command.add_argument("adapters", metavar="ADAPTER", nargs="+", help=_NAMES)
    command.add_argument(
        "--weights",
        nargs="+",
        type=float,
        metavar="W",
        help="one number for each adapter; default: equal shares that add up to 1",
    )
    command.add_argument("--out", required=True, type=Path, metavar="DIR", help="a new folder")
    _add_json(command)
    command.set_defaults(run=_fuse)

    command = commands.add_parser(
        "register", help="make a folder's adapter a version in the registry, fused ones for example"
    )
    command.add_argument("folder", type=Path, metavar="DIR", help="an adapter's folder")
    command.add_argument("name", metavar="NAME", help="<tenant>.<name>")
    command.add_argument("--alias", default="champion", help="moved to it; default: champion")
    _add_json(command)
    command.set_defaults(run=_register)

    command = commands.add_parser(
        "inspect", help="show what an adapter changes, where, how much, and of which base"
    )
    command.add_argument("adapter", metavar="ADAPTER", help=_NAMES)
    _add_json(command)
    command.set_defaults(run=_inspect)


def _add_json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="the same facts for a program")


def _load(ref: str) -> "tuple[LocatedAdapter, Adapter]":
    from s2ft_ray.method import Adapter
    from s2ft_ray.registry import locate_adapter

    found = locate_adapter(ref)
    return found, Adapter.load(found.folder)


def _check_out(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out}: exists and is not empty; name a new folder")


def _export(args: argparse.Namespace) -> int:
    if args.format == "merged" and args.uniform_rank:
        raise ConfigError("--uniform-rank is for --format peft: a merged model has no ranks")
    if args.format == "peft" and args.base:
        raise ConfigError("--base is for --format merged: a LoRA directory doesn't hold the base")
    _check_out(args.out)
    _, adapter = _load(args.adapter)
    facts = {"format": args.format, "folder": str(args.out), "fingerprint": adapter.fingerprint}
    if args.format == "peft":
        adapter.export_peft(args.out, uniform_rank=args.uniform_rank)
        base, rank = adapter.base.name, max(part.count for part in adapter.slices.values())
        facts |= {"base": base, "rank": rank}
        line = f"LoRA of rank {rank} for {base} in {args.out}"
    else:
        base = _export_merged(adapter, args.base, args.out)
        facts |= {"base": base}
        line = f"{base} with {adapter.fingerprint[:12]} merged into it, in {args.out}"
    print(json.dumps(facts, indent=2) if args.json else line)
    return 0


def _export_merged(adapter: "Adapter", base: str | None, out: Path) -> str:
    """Merge into the base's files, or into the loaded model where those don't allow it.

    Returns the base's name or folder.
    """
    from s2ft_ray.bases import load_base_model, local_folder
    from s2ft_ray.config import ModelConfig
    from s2ft_ray.method import copy_settings

    name = base or adapter.base.name
    if name is None:
        raise ConfigError("the adapter doesn't name its base; give its folder or name with --base")
    model = ModelConfig(name_or_path=name, revision=None if base else adapter.base.revision)
    try:
        folder = local_folder(model, weights=True)
    except ConfigError as error:
        hint = "" if base else "; a base that has moved is named with --base"
        raise ConfigError(*(f"{fault}{hint}" for fault in error.faults)) from error
    try:
        adapter.export_merged(folder, out)
    except AdapterError:
        # Other names or dtypes in the files than in the model; another base is told here again.
        print("loading the model: its files can't be merged into as they are", file=sys.stderr)
        adapter.export_merged(load_base_model(model), out)
        copy_settings(folder, out)
    template = adapter.training.get("data", {}).get("chat_template")
    if template:  # the one that its prompts were rendered with in training
        (out / "chat_template.jinja").write_text(template, encoding="utf-8")
    return name


def _fuse(args: argparse.Namespace) -> int:
    from s2ft_ray.method import fuse

    _check_out(args.out)
    loaded = [_load(ref) for ref in args.adapters]
    fused = fuse([adapter for _, adapter in loaded], args.weights)
    fused.save(args.out)
    parts = [
        {"adapter": str(found), **part}
        for (found, _), part in zip(loaded, fused.training["fused"], strict=True)
    ]
    if args.json:
        facts = {"folder": str(args.out), "fingerprint": fused.fingerprint, "parts": parts}
        print(json.dumps(facts, indent=2))
        return 0
    for part in parts:
        print(f"{part['weight']:+.3g} x {part['adapter']} ({part['fingerprint'][:12]})")
    print(f"= {fused.fingerprint[:12]} in {args.out}")
    return 0


def _register(args: argparse.Namespace) -> int:
    become_registry_client()
    from s2ft_ray.registry import register_folder

    made = register_folder(args.folder, args.name, args.alias)
    if args.json:
        print(json.dumps(asdict(made), indent=2))
    else:
        print(f"{made.name}@{made.alias} is version {made.version}, {made.fingerprint[:12]}")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from s2ft_ray.cli.inspection import describe, print_inspection

    facts = describe(*_load(args.adapter))
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        print_inspection(facts)
    return 0
