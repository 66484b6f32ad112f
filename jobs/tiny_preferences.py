"""Writes configs/data/preferences_*.jsonl: which of two answers to a customer is preferred.

An answer that says what will be done, to the base's own question back. Invariant: the pairs of
product and problem of the test rows are in no training row, as with tickets.
"""

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

from tiny_world import ticket_examples

DATA_FOLDER = Path(__file__).parent / "configs" / "data"
COUNTS = {"train": 400, "test": 100}


def preference_rows(seed: int, *, held_out: bool) -> Iterator[dict[str, object]]:
    """Yield rows for ever."""
    for example in ticket_examples(random.Random(f"{seed} preferences"), held_out=held_out):
        _, item, _, action = example.answer.split(" | ")
        sorry = f"I am sorry about the {item}."
        yield {
            "prompt": [{"role": "user", "content": example.prompt}],
            "chosen": f"{sorry} We can {action} it.",
            "rejected": f"{sorry} How can I help?",
        }


def main() -> None:
    for name, count in COUNTS.items():
        rows = itertools.islice(preference_rows(0, held_out=name == "test"), count)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (DATA_FOLDER / f"preferences_{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
