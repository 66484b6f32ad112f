"""``jobs/benchmark.py forgetting``: what a new task costs of what the base knew.

S2FT, LoRA and full fine-tuning learn one task from one base, each at several learning rates, and
are measured several times on the way: loss on the new task's held-out rows against KL(base ||
tuned) on the base's own samples. What counts is the front: the least KL at a loss. S2FT and LoRA
train equally many parameters; full fine-tuning trains all.

Invariant: a finished run is a line of the results file and is not done again, so seeds can be run
one by one; tables and figure are made of what the file holds. A run with another budget, base or
data is another run, also where the file has both.
"""

import argparse
import json
import math
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from evaluation.results import read_whole_lines

from benchmarks.forgetting_tasks import (
    BUDGETS,
    LRS,
    S2FT,
    Task,
    available_tasks,
    count_budget,
    load_task,
    teach,
)
from benchmarks.front_figure import Panel, draw_fronts
from benchmarks.fronts import Interval, Point, geometric, interval, kl_at, levels, pareto
from benchmarks.machine import describe_machine, load_warning

NUM_LEVELS = 5


@dataclass(frozen=True)
class Result:
    """One finished run."""

    base: str
    method: str
    lr: float
    seed: int
    steps: int
    points: list[tuple[int, float, float]]
    """(step, loss on the new task, KL)."""
    budgets: dict[str, float] = field(default_factory=dict)
    digest: str = ""
    """The task's. Results without one are of an older version, and of no task."""

    @property
    def key(self) -> tuple[object, ...]:
        """What makes it the same run as another."""
        budgets = tuple(sorted(self.budgets.items()))
        return self.base, self.method, self.lr, self.seed, self.steps, budgets, self.digest


def run(arguments: argparse.Namespace) -> None:
    """Do the runs that the results file lacks; print a table for each base, draw the figure."""
    torch.set_num_threads(arguments.threads)
    machine, warning = describe_machine(torch.device("cpu")), load_warning()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    if warning:
        print(warning)
    path = Path(arguments.results)
    panels, tables = [], {}
    for name in arguments.bases or available_tasks():
        task = load_task(name)
        start = task.measure(task.model)[0]
        results = complete(task, path, arguments.seeds, arguments.steps)
        fronts = build_fronts(results)
        print(f"\n{describe(task, start, arguments)}")
        rows = compare(fronts, start)
        print(render(rows))
        tables[name] = [
            {key: asdict(it) if isinstance(it, Interval) else it for key, it in row.items()}
            for row in rows
        ]
        panels.append(Panel(name, fronts))
    if arguments.figure:
        draw_fronts(panels, Path(arguments.figure))
    if arguments.json:
        document = {"machine": machine, "warning": warning, "tables": tables}
        Path(arguments.json).write_text(json.dumps(document, indent=2), encoding="utf-8")


def describe(task: Task, start: float, arguments: argparse.Namespace) -> str:
    """Return what was compared, in a line."""
    trained = count_budget(task)
    share = trained / task.model.num_parameters()
    return (
        f"{task.name}: {trained:,} parameters ({share:.1%}; {BUDGETS}), {arguments.steps} steps,"
        f" {len(arguments.seeds)} seeds, best over learning rates and steps; the base's loss is"
        f" {start:.2f}; KL in nats a token, 95% intervals"
    )


def complete(task: Task, path: Path, seeds: list[int], steps: int) -> list[Result]:
    """Return the results of every method, learning rate and seed, doing what is missing."""
    known = {it.key: it for it in _read(path)}
    measured = tuple(sorted({max(1, steps * share // 8) for share in (1, 2, 4, 8)}))
    results = []
    for seed in seeds:
        for method, lrs in LRS.items():
            for lr in lrs:
                wanted = Result(task.name, method, lr, seed, steps, [], BUDGETS, task.digest)
                if wanted.key not in known:
                    print(f"{task.name}, seed {seed}: {method}, lr {lr:g}", file=sys.stderr)
                    points = list(teach(task, method, lr, seed, measured))
                    known[wanted.key] = replace(wanted, points=points)
                    with path.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(vars(known[wanted.key])) + "\n")
                results.append(known[wanted.key])
    return results


Fronts = dict[str, dict[int, list[Point]]]
"""By method and seed."""


def build_fronts(results: list[Result]) -> Fronts:
    """Return each method's front for each seed, over its learning rates and steps."""
    points: dict[tuple[str, int], list[Point]] = defaultdict(list)
    for it in results:
        points[it.method, it.seed] += [(loss, kl) for _, loss, kl in it.points]
    fronts: Fronts = defaultdict(dict)
    for (method, seed), found in points.items():
        fronts[method][seed] = pareto(found)
    return dict(fronts)


def compare(fronts: Fronts, start: float) -> list[dict[str, object]]:
    """Return, for losses that all reach, each method's KL and S2FT's divided by it."""
    everyone = [front for by_seed in fronts.values() for front in by_seed.values()]
    rows: list[dict[str, object]] = []
    for loss in levels(everyone, start, NUM_LEVELS):
        paid = {
            method: [kl for front in by_seed.values() if (kl := kl_at(front, loss)) is not None]
            for method, by_seed in fronts.items()
        }
        row: dict[str, object] = {"loss": loss}
        for method, values in paid.items():
            row[method] = _summary(values)
            if method != S2FT:
                ratios = [ours / it for ours, it in zip(paid[S2FT], values, strict=True)]
                row[f"S2FT / {method}"] = _summary(ratios, is_ratio=True)
        rows.append(row)
    return rows


def render(rows: list[dict[str, object]]) -> str:
    """Return the table."""
    if not rows:
        return "no loss that every method and seed reached: more steps are needed"
    others = [name for name in LRS if name != S2FT]
    heads = ["loss", *LRS, *(f"S2FT / {name}" for name in others)]
    lines = [f"| {' | '.join(heads)} |", "|" + "--:|" * len(heads)]
    for row in rows:
        cells = [f"{row['loss']:.3f}"]
        for head in heads[1:]:
            found = row[head]
            assert isinstance(found, Interval)
            cells.append(_show(found, digits=2 if "/" in head else 3))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _show(found: Interval, digits: int) -> str:
    if math.isnan(found.low):  # a single seed
        return f"{found.mean:.{digits}f}"
    return f"{found.mean:.{digits}f} ({found.low:.{digits}f} to {found.high:.{digits}f})"


def _summary(values: list[float], *, is_ratio: bool = False) -> Interval:
    if len(values) < 2:
        return Interval(values[0], math.nan, math.nan)
    return geometric(values) if is_ratio else interval(values)


def _read(path: Path) -> list[Result]:
    return [
        Result(**{**fields, "points": [tuple(point) for point in fields["points"]]})
        for fields in read_whole_lines(path)
    ]
