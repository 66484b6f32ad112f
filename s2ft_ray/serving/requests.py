"""What goes into the engine and what comes out: plain values, no text.

Invariant: a request that exists can be served: its limits are checked where it is made.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class AdapterKey:
    """An adapter's identity in memory: it keys slots, caches and metrics."""

    name: str
    """The registered model: ``<tenant>.<name>``."""
    version: str
    fingerprint: str

    def __str__(self) -> str:
        return f"{self.name}:{self.version}"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is taken from the logits."""

    max_tokens: int = 16
    temperature: float = 1.0
    """0: the likeliest token, whatever the rest says."""
    top_p: float = 1.0
    """The likeliest tokens that together have this probability."""
    top_k: int = 0
    """So many likeliest tokens; 0: all."""
    seed: int | None = None
    """The same seed gives the same tokens, whatever else is served; None: drawn anew."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens that were generated before."""
    frequency_penalty: float = 0.0
    """Taken as often as the token was generated before."""
    logprobs: int | None = None
    """Tell each token's log probability, and so many of the likeliest; None: neither."""
    json_schema: Mapping[str, Any] | None = None
    """The output is JSON that fits; an empty mapping: any JSON."""
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A prompt to continue, by an adapter or (None) by the base alone."""

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    adapter: AdapterKey | None = None
    tenant: str | None = None
    """Whose turn it is when adapters wait for memory."""


TopLogprobs = tuple[tuple[int, float], ...]
"""(token id, log probability), likeliest first."""


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """One generated token."""

    token_id: int
    logprob: float | None = None
    """Of the raw distribution: before temperature, cuts, penalties and schema."""
    top_logprobs: TopLogprobs = ()
    finish_reason: FinishReason | None = None
    """Set with the last token: "stop" is the end-of-sequence token, or the end of the JSON."""


@dataclass(frozen=True, slots=True)
class PromptLogprob:
    """What the model says of one token of a prompt, given those before it."""

    token_id: int
    logprob: float | None
    """None for the first token."""
    top_logprobs: TopLogprobs = ()
