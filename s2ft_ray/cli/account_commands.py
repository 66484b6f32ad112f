"""tenants and keys: who may use the service, and how much of it."""

import argparse
import json
from dataclasses import asdict
from datetime import UTC, datetime

from s2ft_ray.cli.table import print_table


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands of this subject to the parser."""
    tenants = commands.add_parser("tenants", help="list tenants, or set one's weight and limits")
    actions = tenants.add_subparsers(metavar="ACTION", required=True)
    action = actions.add_parser("list", help="every tenant with its weight and limits")
    action.add_argument("--json", action="store_true", help="the same facts for a program")
    action.set_defaults(run=_list_tenants)
    action = actions.add_parser("set", help="add a tenant, or change what is named of it")
    action.add_argument("tenant", metavar="TENANT")
    action.add_argument(
        "--weight",
        type=float,
        default=argparse.SUPPRESS,
        metavar="W",
        help="its share of a contended cluster, relative to the others' (default 1)",
    )
    action.add_argument(
        "--quota",
        type=int,
        default=argparse.SUPPRESS,
        metavar="N",
        help="workers that it is guaranteed (default 0)",
    )
    for option, text in (
        ("--max-workers", "workers that it may never pass"),
        ("--priority-cap", "the highest priority that it may ask for"),
        ("--max-queued", "jobs that it may have waiting"),
        ("--max-concurrent-requests", "served requests at once"),
        ("--requests-per-minute", "served requests in a minute"),
    ):
        action.add_argument(
            option,
            type=_number_or_none,
            default=argparse.SUPPRESS,
            metavar="N",
            help=f"{text}; none: no limit",
        )
    action.add_argument(
        "--data-root",
        action="append",
        dest="data_roots",
        default=argparse.SUPPRESS,
        metavar="URL",
        help="a folder or URL that its data must lie in; may be repeated",
    )
    action.set_defaults(run=_set_tenant)

    keys = commands.add_parser("keys", help="create, list and revoke API keys")
    actions = keys.add_subparsers(metavar="ACTION", required=True)
    action = actions.add_parser("create", help="make a key; its secret is shown this once")
    action.add_argument("--tenant", metavar="TENANT", help="whose models the key may call")
    action.add_argument(
        "--operator", action="store_true", help="a key for everything: promote, roll back, metrics"
    )
    action.set_defaults(run=_create_key)
    action = actions.add_parser("list", help="every key, without its secret")
    action.add_argument("--tenant", metavar="TENANT", help="of this tenant only")
    action.add_argument("--json", action="store_true", help="the same facts for a program")
    action.set_defaults(run=_list_keys)
    action = actions.add_parser("revoke", help="make a key invalid from now on")
    action.add_argument("key", metavar="ID")
    action.set_defaults(run=_revoke_key)


def _number_or_none(text: str) -> int | None:
    return None if text == "none" else int(text)


def _list_tenants(args: argparse.Namespace) -> int:
    from s2ft_ray.accounts import Accounts

    tenants = Accounts().tenants()
    if args.json:
        print(json.dumps([tenant.model_dump(mode="json") for tenant in tenants], indent=2))
        return 0
    header = ("TENANT", "WEIGHT", "QUOTA", "MAX WORKERS", "PRIORITY CAP", "MAX QUEUED")
    rows = [
        (
            tenant.name,
            f"{tenant.weight:g}",
            *map(_or_dash, (tenant.quota, tenant.max_workers, tenant.priority_cap)),
            _or_dash(tenant.max_queued),
        )
        for tenant in tenants
    ]
    print_table(header, rows)
    return 0


def _set_tenant(args: argparse.Namespace) -> int:
    from s2ft_ray.accounts import Accounts, Tenant

    given = vars(args)
    changes = {key: given[key] for key in Tenant.model_fields if key != "name" and key in given}
    tenant = Accounts().set_tenant(args.tenant, **changes)
    print(json.dumps(tenant.model_dump(mode="json")))
    return 0


def _create_key(args: argparse.Namespace) -> int:
    from s2ft_ray.accounts import Accounts

    print(Accounts().create_key(args.tenant, operator=args.operator).secret)
    return 0


def _list_keys(args: argparse.Namespace) -> int:
    from s2ft_ray.accounts import Accounts

    keys = Accounts().keys(args.tenant)
    if args.json:
        times = ("created_at", "revoked_at")
        rows = [asdict(key) | {t: _time(getattr(key, t)) for t in times} for key in keys]
        print(json.dumps(rows, indent=2))
        return 0
    header = ("ID", "TENANT", "OPERATOR", "CREATED", "REVOKED")
    print_table(
        header,
        [
            (
                key.id,
                _or_dash(key.tenant),
                "yes" if key.is_operator else "no",
                _or_dash(_time(key.created_at)),
                _or_dash(_time(key.revoked_at)),
            )
            for key in keys
        ],
    )
    return 0


def _revoke_key(args: argparse.Namespace) -> int:
    from s2ft_ray.accounts import Accounts

    key = Accounts().revoke_key(args.key)
    print(f"revoked {key.id}")
    return 0


def _time(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)
