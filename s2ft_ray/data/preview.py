"""One encoded row as text, with its loss mask to be seen."""

import itertools
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

DIM, PLAIN = "\x1b[2m", "\x1b[0m"


def preview(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, *, color: bool = False
) -> str:
    """Show a row of ``PreparedData``: what is no target is dim, or without `color` in brackets."""
    ids, mask = row["input_ids"], row["target_mask"]
    parts = []
    shown = ""
    stop = 0
    for is_target, run in itertools.groupby(mask):
        stop += len(list(run))
        text = tokenizer.decode(ids[:stop], clean_up_tokenization_spaces=False)
        part, shown = text[len(shown) :], text  # by itself a run would lose its first space
        if is_target:
            parts.append(part)
        else:
            parts.append(f"{DIM}{part}{PLAIN}" if color else f"[{part}]")
    return "".join(parts)
