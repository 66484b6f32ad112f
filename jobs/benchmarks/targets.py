"""What S2FT's training step is expected to cost relative to others: upper bounds of ratios."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """The most that S2FT may need, divided by what the other needs; None: no expectation."""

    seconds: float | None = None
    peak_bytes: float | None = None
    kept_bytes: float | None = None


WIDE_LORA, DORA, FULL = "LoRA q k v up down", "DoRA q k v up down", "full fine-tuning"
WIDE_LORA_DROPOUT, DORA_DROPOUT = f"{WIDE_LORA}, dropout", f"{DORA}, dropout"
LIMIT = "limit: frozen weights"

# Set before the start, from a sketch on two idle CPU cores whose LoRA and DoRA had dropout or not:
# that was not noted, so the same is asked against both.
_SMALL = {
    "fp32": {
        LIMIT: Target(seconds=1.03),
        WIDE_LORA: Target(seconds=0.75, kept_bytes=0.75),
        WIDE_LORA_DROPOUT: Target(seconds=0.75, kept_bytes=0.75),
        DORA: Target(seconds=0.47),
        DORA_DROPOUT: Target(seconds=0.47),
        FULL: Target(seconds=0.67),
    },
    "bf16": {
        LIMIT: Target(seconds=1.03),
        WIDE_LORA: Target(seconds=0.70, kept_bytes=0.57),
        WIDE_LORA_DROPOUT: Target(seconds=0.70, kept_bytes=0.57),
        DORA: Target(seconds=0.47),
        DORA_DROPOUT: Target(seconds=0.47),
        FULL: Target(seconds=0.59),
    },
}

# Milliseconds and GB of S2FT, LoRA and full fine-tuning on one A100, LLaMA-2-7B in bf16
# (arXiv 2412.06289), by rows x tokens.
_PAPER_7B = {
    (1, 512): ((118, 18), (138, 20), (314, 54)),
    (2, 512): ((231, 23), (260, 26), (439, 54)),
    (1, 1024): ((258, 26), (288, 29), (461, 54)),
    (2, 1024): ((476, 39), (529, 45), (713, 54)),
}


def targets(shape: str, dtype: str, rows: int, tokens: int) -> dict[str, Target]:
    """Return what is expected of a case, by contender; nothing for sizes that nobody measured."""
    if shape == "small" and (rows, tokens) == (4, 256):
        return _SMALL[dtype]
    if shape == "7b" and dtype == "bf16" and (rows, tokens) in _PAPER_7B:
        (ms, size), (lora_ms, lora_size), (full_ms, full_size) = _PAPER_7B[rows, tokens]
        return {
            LIMIT: Target(seconds=1.05),
            WIDE_LORA: Target(seconds=ms / lora_ms, peak_bytes=size / lora_size),
            FULL: Target(seconds=ms / full_ms, peak_bytes=size / full_size),
        }
    return {}
