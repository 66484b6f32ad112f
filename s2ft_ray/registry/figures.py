"""Pictures of a run: its loss, what it trains, and where in the model it moved the weights.

Invariant: drawn by matplotlib's object API on the Agg canvas: no display, no global state, safe in
any thread.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from s2ft_ray.method import Selection
from s2ft_ray.method.selection import KINDS
from s2ft_ray.registry.deltas import ModuleDelta
from s2ft_ray.registry.journal import Point

TRAIN_COLOUR, EVAL_COLOUR = "#4477aa", "#cc3311"  # told apart by colour-blind readers too
_COLOURS = colormaps["viridis"].with_extremes(bad="#dddddd")
_MOST_NUMBERS = 128  # cells that are still legible with their number written in
_MOST_ROWS = 64  # rows of a panel: more heads or channels than that share one
_UNITS = {
    "heads": "query head",
    "kv_heads": "key/value head",
    "channels": "channel",
    "expert_channels": "channel of each expert",
    "shared_channels": "channel of the shared expert",
}
_ORDER = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down")


def draw_loss(points: Sequence[Point], path: Path, title: str) -> None:
    """Draw training and held-out loss over the steps into the PNG `path`."""
    train = [(p.step, p.values["loss"]) for p in points if p.kind == "train" and "loss" in p.values]
    held = [(p.step, p.values["loss"]) for p in points if p.kind == "eval" and "loss" in p.values]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    if train:
        steps, losses = np.array(train).T
        axes.plot(steps, losses, color=TRAIN_COLOUR, alpha=0.3, linewidth=1, label="train, a step")
        smooth = _smooth(losses)
        axes.plot(steps, smooth, color=TRAIN_COLOUR, linewidth=2, label="train, smoothed")
    if held:
        steps, losses = np.array(held).T
        axes.plot(steps, losses, "o-", color=EVAL_COLOUR, linewidth=2, label="held out")
        for step, loss in (held[0], held[-1]):
            axes.annotate(
                f"{loss:.3f}",
                (step, loss),
                textcoords="offset points",
                xytext=(0, 9),
                ha="center",
                color=EVAL_COLOUR,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
            )
    axes.set(xlabel="step", ylabel="loss per target token", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(y=0.12)
    axes.grid(alpha=0.25)
    if train or held:
        axes.legend()
    _write(figure, path)


def draw_deltas(deltas: Sequence[ModuleDelta], path: Path, title: str) -> None:
    """Draw the relative norm of each module's delta, projections over layers, into `path`."""
    rows, columns, cells = _arrange(deltas)
    width = min(24.0, 3.0 + 0.42 * len(columns))
    figure = Figure(figsize=(max(6.0, width), 2.0 + 0.42 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(100 * cells, aspect="auto", cmap=_COLOURS, vmin=0)
    axes.set(xlabel="layer", title=title)
    shown = range(0, len(columns), max(1, len(columns) // 32))
    axes.set_xticks(list(shown), [columns[i] for i in shown])
    axes.set_yticks(range(len(rows)), rows)
    if cells.size <= _MOST_NUMBERS:
        _write_numbers(axes, 100 * cells)
    label = "delta's norm, % of\nthe base slice's norm"
    figure.colorbar(image, ax=axes, label=label, pad=0.01, fraction=0.05)
    _write(figure, path)


def draw_selection(selection: Selection, path: Path, title: str) -> None:
    """Draw which heads and channels are trained, by layer, one panel a kind, into `path`."""
    kinds = [kind for kind in KINDS if getattr(selection, kind)]
    width = min(24.0, max(6.0, 3.0 + 0.2 * selection.num_layers))
    heights = [1.0 + 0.06 * min(_MOST_ROWS, selection.num_units[kind]) for kind in kinds]
    figure = Figure(figsize=(width, 1.0 + sum(heights)), layout="constrained")
    panels = figure.subplots(len(kinds), sharex=True, squeeze=False, height_ratios=heights)
    for axes, kind in zip(panels[:, 0], kinds, strict=True):
        cells = 100 * _selected_shares(selection, kind)
        last = selection.num_units[kind] - 0.5
        image = axes.imshow(
            cells,
            aspect="auto",
            interpolation="nearest",
            cmap="Blues",
            vmin=0,
            extent=(-0.5, selection.num_layers - 0.5, last, -0.5),
        )
        axes.set(ylabel=_UNITS[kind])
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(image, ax=axes, label="% trained", pad=0.01, fraction=0.05)
    panels[-1, 0].set(xlabel="layer")
    panels[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0, 0].set(title=title)
    _write(figure, path)


def _selected_shares(selection: Selection, kind: str) -> Any:
    """Return the share of each cell's units that is trained: [rows, layers], of experts all."""
    count = selection.num_units[kind]
    edges = np.linspace(0, count, min(_MOST_ROWS, count) + 1)
    cells = np.zeros((len(edges) - 1, selection.num_layers))
    for layer, units in getattr(selection, kind).items():
        of_each = units if kind == "expert_channels" else [units]
        chosen, _ = np.histogram(np.concatenate(of_each), bins=edges)
        cells[:, layer] = chosen / len(of_each)
    return cells / np.histogram(np.arange(count), bins=edges)[0][:, None]


def _arrange(deltas: Sequence[ModuleDelta]) -> tuple[list[str], list[str], Any]:
    places = {delta.module: _place(delta.module) for delta in deltas}
    paths = {path for path, _ in places.values()}
    if len({_last(path) for path in paths}) == len(paths):
        places = {module: (_last(path), layer) for module, (path, layer) in places.items()}
    rows = sorted({row for row, _ in places.values()}, key=_order)
    layers = sorted({layer for _, layer in places.values()})
    cells = np.full((len(rows), len(layers)), np.nan)
    for delta in deltas:
        row, layer = places[delta.module]
        cells[rows.index(row), layers.index(layer)] = delta.relative
    return rows, [str(layer) for layer in layers], np.ma.masked_invalid(cells)


def _place(module: str) -> tuple[str, int]:
    """Return the path within the layer, and the layer."""
    layer = re.search(r"\.(\d+)\.", module)
    return (module[layer.end() :], int(layer.group(1))) if layer else (module, 0)


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _order(row: str) -> tuple[int, str]:
    name = _last(row).removesuffix("_proj")
    return (_ORDER.index(name) if name in _ORDER else len(_ORDER), row)


def _write_numbers(axes: Any, cells: Any) -> None:
    middle = cells.max() / 2
    for (row, column), value in np.ndenumerate(cells):
        if not np.ma.is_masked(cells[row, column]):
            colour = "white" if value < middle else "black"
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=colour, size=8)


def _smooth(losses: Any) -> Any:
    # A mean over the last twentieth of the run: long enough to see a trend, short enough to follow.
    window = max(1, len(losses) // 20)
    padded = np.concatenate([[0.0], np.cumsum(losses)])
    ends = np.arange(1, len(losses) + 1)
    starts = np.maximum(0, ends - window)
    return (padded[ends] - padded[starts]) / (ends - starts)


def _write(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=120)
