"""A file of scored rows that an interrupted evaluation goes on from.

Invariant: the first line says what is evaluated and how; each further line is one scored row,
written when its batch is done. A file of another evaluation is refused, never mixed.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from s2ft_ray.errors import ConfigError


@dataclass(frozen=True)
class ScoredRow:
    """What the model wrote for one row, and whether its answer was right."""

    task: str
    number: int
    """The row in its file, from 0."""
    written: str
    found: str
    """The answer in it; empty: none."""
    answer: str
    is_right: bool


class ResultsFile:
    """The scored rows of one evaluation, in a JSONL file."""

    def __init__(self, path: Path, evaluation: dict[str, Any]) -> None:
        """Open or begin the file. Raises ConfigError where it holds another evaluation's rows."""
        self.path = path
        self.rows: dict[tuple[str, int], ScoredRow] = {}
        self.mlflow_run: str | None = None
        """The run that the whole evaluation was logged to."""
        lines = read_whole_lines(path)
        if not lines:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"evaluation": evaluation}) + "\n", encoding="utf-8")
            return
        _check_same(path, lines[0].get("evaluation"), evaluation)
        for line in lines[1:]:
            if "mlflow_run" in line:
                self.mlflow_run = line["mlflow_run"]
            else:
                row = ScoredRow(**line)
                self.rows[row.task, row.number] = row

    def add(self, rows: Iterable[ScoredRow]) -> None:
        """Append the rows of a batch."""
        for row in rows:
            self.rows[row.task, row.number] = row
            self._append(asdict(row))

    def set_mlflow_run(self, run_id: str) -> None:
        """Note that the evaluation was logged."""
        self.mlflow_run = run_id
        self._append({"mlflow_run": run_id})

    def accuracy(self, task: str) -> float:
        """Return the share of right rows of a test set."""
        rows = [row for row in self.rows.values() if row.task == task]
        return sum(row.is_right for row in rows) / len(rows)

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_whole_lines(path: Path) -> list[dict[str, Any]]:
    """Read the lines that were written to their end, and take a torn last one off the file."""
    if not path.exists():
        return []
    whole = path.read_bytes()
    end = whole.rfind(b"\n") + 1
    if end < len(whole):
        with path.open("r+b") as file:
            file.truncate(end)
    try:
        return [json.loads(line) for line in whole[:end].splitlines()]
    except ValueError as error:
        raise ConfigError(f"{path}: holds no results: {error}; name another file") from error


def _check_same(path: Path, found: Any, wanted: dict[str, Any]) -> None:
    if found == wanted:
        return
    kept = found if isinstance(found, dict) else {}
    differs = [key for key in wanted if kept.get(key) != wanted[key]]
    raise ConfigError(
        f"{path}: holds another evaluation, it differs in {', '.join(differs) or 'its keys'};"
        " name another file, or remove it"
    )
