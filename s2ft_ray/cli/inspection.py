"""What an adapter is, as plain facts and as a table."""

from typing import Any

from s2ft_ray.bases import find_folder
from s2ft_ray.cli.table import print_table
from s2ft_ray.errors import AdapterError
from s2ft_ray.method import Adapter, base_fingerprint_of_files
from s2ft_ray.registry import LocatedAdapter, measure_deltas

_MOST_RANGES = 3


def describe(found: LocatedAdapter, adapter: Adapter) -> dict[str, Any]:
    """Return all that is known of the adapter: names, identity, base, and each module's change.

    ``relative_norm`` (to the base's entries that change) is null where the base isn't here.
    """
    relative = _measure(adapter)
    return {
        "name": found.name if found.version is not None else None,
        "version": found.version,
        "folder": str(found.folder),
        "fingerprint": adapter.fingerprint,
        "base": {
            "name": adapter.base.name,
            "revision": adapter.base.revision,
            "fingerprint": adapter.base.fingerprint,
        },
        "config": adapter.config.model_dump(mode="json"),
        "training": adapter.training,
        "num_parameters": adapter.num_parameters,
        "modules": [
            {
                "module": name,
                "side": part.side,
                "count": part.count,
                "size": part.size,
                "num_parameters": part.delta.numel(),
                "norm": float(part.delta.norm()),
                "relative_norm": relative.get(name),
                "indices": part.indices.tolist(),
            }
            for name, part in adapter.slices.items()
        ],
    }


def _measure(adapter: Adapter) -> dict[str, float]:
    """Return each delta's norm over that of what it changes; nothing where the base isn't here."""
    if adapter.base.name is None:
        return {}
    folder = find_folder(adapter.base.name, adapter.base.revision)
    try:
        if folder is None or base_fingerprint_of_files(folder) != adapter.base.fingerprint:
            return {}
    except AdapterError:  # its files aren't safetensors, or are damaged
        return {}
    return {delta.module: delta.relative for delta in measure_deltas(adapter, folder)}


def print_inspection(facts: dict[str, Any]) -> None:
    """Print the facts for a person: a head of a few lines, then one row a module."""
    base, config, modules = facts["base"], facts["config"], facts["modules"]
    name = f"{facts['name']} version {facts['version']}" if facts["name"] else facts["folder"]
    budgets = " ".join(f"{key}={value:g}" for key, value in config["budgets"].items())
    end = "" if config["selection"] == "random" else f" {config['subset']}"
    print(f"adapter      {name}")
    print(f"fingerprint  {facts['fingerprint']}")
    revision = f" at {base['revision']}" if base["revision"] else ""
    print(f"base         {base['name']}{revision} (fingerprint {base['fingerprint'][:12]})")
    print(f"selection    {config['selection']}{end}, {config['allocation']}, {budgets}")
    for part in facts["training"].get("fused", []):
        print(f"fused        {part['weight']:+.3g} x {part['fingerprint'][:12]}")
    print(f"changes      {facts['num_parameters']:,} parameters in {len(modules)} modules")
    print()
    header = ("MODULE", "CHANGES", "OF", "PARAMETERS", "NORM", "RELATIVE", "INDICES")
    print_table(header, [_row(module) for module in modules])
    if any(module["relative_norm"] is None for module in modules):
        print("\nRELATIVE is missing: the adapter's base is not on this machine under its name.")


def _row(module: dict[str, Any]) -> tuple[str, ...]:
    relative = module["relative_norm"]
    return (
        module["module"],
        f"{module['count']} {'columns' if module['side'] == 'in' else 'rows'}",
        "-" if module["size"] is None else str(module["size"]),
        f"{module['num_parameters']:,}",
        f"{module['norm']:.4g}",
        "-" if relative is None else f"{relative:.2%}",
        _show_indices(module["indices"]),
    )


def _show_indices(indices: list[Any]) -> str:
    if isinstance(indices[0], list):
        return f"of each of {len(indices)} experts"
    return _show_ranges(indices)


def _show_ranges(indices: list[int]) -> str:
    """Write ascending indices as ranges, the first few: ``0-15 32-47 and 4 more``."""
    ranges: list[list[int]] = []
    for index in indices:
        if ranges and index == ranges[-1][1] + 1:
            ranges[-1][1] = index
        else:
            ranges.append([index, index])
    shown = [f"{low}-{high}" if low < high else str(low) for low, high in ranges[:_MOST_RANGES]]
    more = f" and {len(ranges) - _MOST_RANGES} more" if len(ranges) > _MOST_RANGES else ""
    return " ".join(shown) + more
