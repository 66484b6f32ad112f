"""The month as a picture: shares against entitlements, waits, and workers in use."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np

from benchmarks.queue_trace import HOUR, Trace

if TYPE_CHECKING:
    from benchmarks.queue import Result

matplotlib.use("Agg")


def draw(path: Path, trace: Trace, results: "Sequence[Result]") -> None:
    """Write the picture to `path`."""
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    for result in results:
        off = np.sort(result.fairness.off_capacity) * 100
        left.plot(off, np.linspace(0, 1, len(off)), label=result.name)
        waits = np.sort([job.waited_s / HOUR for job in result.record.jobs.values()])
        middle.plot(waits, np.linspace(0, 1, len(waits)), label=result.name)
        days = np.arange(len(result.hourly)) / 24
        smooth = np.convolve(result.hourly, np.ones(24) / 24, mode="same")
        right.plot(days, smooth, label=result.name)
    left.axvspan(-5, 5, color="0.9", zorder=0)
    left.set(
        title="days in which a tenant waited all along",
        xlabel="got minus entitled, % of the day's capacity",
        ylabel="share of such days",
    )
    middle.set(title="waits", xlabel="hours in the queue", ylabel="share of jobs", xscale="symlog")
    right.set(
        title=f"workers in use, of {trace.num_workers}",
        xlabel="day",
        ylabel="share, 24 h mean",
        ylim=(0, 1.02),
    )
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    left.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
