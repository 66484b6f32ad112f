"""A picture of fronts: loss on the new task against KL from the base, a panel for each base.

Drawn by matplotlib's object API on the Agg canvas: no display, no global state.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.fronts import Point, kl_at

COLOURS = ("#4477aa", "#ee6677", "#ccbb44", "#228833")  # told apart by colour-blind readers too
NUM_LOSSES = 60


@dataclass(frozen=True)
class Panel:
    """What is drawn of one base."""

    title: str
    fronts: dict[str, dict[int, list[Point]]]
    """By method and seed."""


def draw_fronts(panels: Sequence[Panel], path: Path) -> None:
    """Draw each method's fronts into the PNG `path`: the mean over seeds, and their range."""
    figure = Figure(figsize=(6.2 * len(panels), 4.8), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for colour, (method, by_seed) in zip(COLOURS, panel.fronts.items(), strict=False):
            losses, means, lows, highs = _curve(list(by_seed.values()))
            axes.plot(losses, means, color=colour, linewidth=2, label=method)
            axes.fill_between(losses, lows, highs, color=colour, alpha=0.15, linewidth=0)
            for front in by_seed.values():
                axes.plot(*zip(*front, strict=True), ".", color=colour, alpha=0.4, markersize=4)
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="loss on the new task, held out",
            ylabel="KL from the base on its own samples, nats a token",
            title=panel.title,
        )
        axes.grid(alpha=0.25, which="both")
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=120)


def _curve(
    fronts: Sequence[Sequence[Point]],
) -> tuple[list[float], list[float], list[float], list[float]]:
    """Return losses that all the fronts reach, with mean, least and most KL there."""
    lowest, highest = max(f[0][0] for f in fronts), min(f[-1][0] for f in fronts)
    losses, means, lows, highs = [], [], [], []
    for index in range(NUM_LOSSES):
        loss = lowest * (max(highest, lowest) / lowest) ** (index / (NUM_LOSSES - 1))
        paid = [kl for front in fronts if (kl := kl_at(front, loss * (1 + 1e-9))) is not None]
        losses.append(loss)
        means.append(math.exp(math.fsum(math.log(kl) for kl in paid) / len(paid)))
        lows.append(min(paid))
        highs.append(max(paid))
    return losses, means, lows, highs
