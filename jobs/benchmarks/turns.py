"""What the training benchmark has measured: its turns, their table, and the file that keeps them.

Invariant: a line of the file is one contender's memory or one turn, written as soon as it is
known, so that a long comparison can be made in short calls and goes on where it was cut off. Times
are compared over the rounds that both contenders took part in: more turns find a lower minimum.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.targets import Target

MIB = 2**20


@dataclass(frozen=True)
class Turn:
    """The steps that a contender did in one round."""

    round: int
    """The same for everybody's turn in it, and for no other round's of any call."""
    seconds: list[float]
    """Of each step."""
    others: float | None
    """Share of the machine's cores that everything else took meanwhile; None: not known."""

    @property
    def best(self) -> float:
        return min(self.seconds)


@dataclass
class Result:
    """What was measured of one contender."""

    name: str
    num_trainable: int
    kept_bytes: int | None
    """None under activation checkpointing."""
    peak_bytes: int
    turns: list[Turn] = field(default_factory=list)

    @property
    def best(self) -> float:
        """The seconds of the fastest step."""
        return min(turn.best for turn in self.turns)

    def time_ratio(self, own: "Result") -> float:
        """Return the best time of `own` over this one's, in the rounds that both have."""
        mine, theirs = ({turn.round: turn.best for turn in it.turns} for it in (self, own))
        shared = mine.keys() & theirs.keys()
        return min(theirs[it] for it in shared) / min(mine[it] for it in shared)

    def kept_ratio(self, own: "Result") -> float | None:
        """Return the bytes that the graph keeps for `own` over this one's."""
        if own.kept_bytes is None or self.kept_bytes is None:
            return None
        return own.kept_bytes / self.kept_bytes

    def peak_ratio(self, own: "Result") -> float:
        return own.peak_bytes / self.peak_bytes


class TurnFile:
    """The turns of one case, in a JSON Lines file that may hold others (no path: not kept)."""

    def __init__(self, path: Path | None, case: dict[str, Any], timing: dict[str, Any]) -> None:
        """`case` decides the memory (model, batch, types), `timing` with it the times: machine."""
        self._path = path
        self._case, self._timing = json.loads(json.dumps([case, timing]))

    def read(self) -> dict[str, Result]:
        """Return what earlier calls measured of this case, by contender."""
        results: dict[str, Result] = {}
        if self._path is None or not self._path.exists():
            return results
        for line in self._path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if record.pop("case") != self._case:
                continue
            name = record.pop("name")
            if "seconds" not in record:
                results[name] = Result(name, **record)
            elif record.pop("timing") == self._timing:
                results[name].turns.append(Turn(**record))
        return results

    def add_memory(self, it: Result) -> None:
        memory = asdict(it)
        del memory["turns"]
        self._append(memory)

    def add_turn(self, name: str, turn: Turn) -> None:
        self._append({"timing": self._timing, "name": name, **asdict(turn)})

    def _append(self, record: dict[str, Any]) -> None:
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"case": self._case, **record}) + "\n")


def render(results: list[Result], tokens: int, aims: dict[str, Target]) -> str:
    """Return the table: what each contender needs, and the first's need divided by it."""
    own = results[0]
    lines = [
        "| | trainable | step ms | tokens/s | peak MiB | kept MiB | S2FT/it: time | peak | kept |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for it in results:
        aim = aims.get(it.name, Target())
        cells = [
            it.name,
            f"{it.num_trainable:,}",
            f"{it.best * 1000:.1f}",
            f"{tokens / it.best:,.0f}",
            f"{it.peak_bytes / MIB:.1f}",
            "-" if it.kept_bytes is None else f"{it.kept_bytes / MIB:.1f}",
            _ratio(it.time_ratio(own), aim.seconds),
            _ratio(it.peak_ratio(own), aim.peak_bytes),
            "-" if (kept := it.kept_ratio(own)) is None else _ratio(kept, aim.kept_bytes),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def describe_rounds(results: list[Result]) -> str:
    """Return how much was measured, and how far other work disturbed the turns that count."""
    counts = [len(it.turns) for it in results]
    least, most = min(counts), max(counts)
    text = f"best of {least if least == most else f'{least} to {most}'} rounds"
    best = [min(it.turns, key=lambda turn: turn.best) for it in results]
    others = [turn.others for turn in best if turn.others is not None]
    if not others:
        return text
    return f"{text}; other work took at most {max(others):.0%} of the cores in the best turns"


def as_document(it: Result, own: Result) -> dict[str, Any]:
    """Return a result for the JSON file."""
    return {
        **asdict(it),
        "best_seconds": it.best,
        "s2ft_ratio": {
            "seconds": it.time_ratio(own),
            "peak_bytes": it.peak_ratio(own),
            "kept_bytes": it.kept_ratio(own),
        },
    }


def _ratio(ratio: float, most: float | None) -> str:
    if most is None:
        return f"{ratio:.3f}"
    return f"{ratio:.3f} ({'within' if ratio <= most else 'MISSES'} {most:.2f})"
