"""One answer as it grows: tokens come in, pieces of text with their logprobs go out.

Invariant: a piece is final. Text that may turn out to be a stop text is held back with its tokens,
and neither it nor what comes behind it ever goes out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from s2ft_ray.serving.detokenizer import Detokenizer
from s2ft_ray.serving.requests import FinishReason, TokenOutput, TopLogprobs
from s2ft_ray.serving.stops import StopMatcher

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenLogprob:
    """A token's logprob beside the likeliest ones at its place."""

    token_id: int
    logprob: float | None
    """None for the first token of a scored prompt: nothing comes before it."""
    top: TopLogprobs = ()
    offset: int = 0
    """In characters from the start of the answer."""


@dataclass
class Piece:
    """What is new of an answer."""

    text: str = ""
    tokens: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def __bool__(self) -> bool:
        return bool(self.text or self.tokens or self.finish_reason)

    def add(self, later: "Piece") -> None:
        """Put the next piece of the same answer behind this one."""
        self.text += later.text
        self.tokens += later.tokens
        self.finish_reason = later.finish_reason or self.finish_reason


class Answer:
    """One answer to one prompt. `is_finished` once its last piece is out."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        prompt_ids: Sequence[int],
        stops: Sequence[str] = (),
        tells_end: bool = False,
    ) -> None:
        """With `tells_end` the end token is among the tokens, without a text."""
        self._detokenizer = Detokenizer(tokenizer, prompt_ids)
        self._stops = StopMatcher(stops)
        self._tells_end = tells_end
        self._num_decoded = 0  # characters out of the detokenizer
        self._num_released = 0  # of them, those that went out
        self._held: list[TokenLogprob] = []
        self.num_tokens = 0
        self.is_finished = False

    def follow(self, prompt_text: str) -> None:
        """Count offsets from the start of the echoed prompt."""
        self._num_decoded = self._num_released = len(prompt_text)

    def push(self, output: TokenOutput) -> Piece:
        """Take one token; return what is certain with it, which may be nothing."""
        self.num_tokens += 1
        ends = output.finish_reason is not None
        start = self._num_decoded
        text = self._detokenizer.push(output.token_id)
        if ends:
            text += self._detokenizer.finish()
        self._num_decoded += len(text)
        # an end token is no part of the answer's text
        if text or output.finish_reason != "stop" or self._tells_end:
            self._held.append(
                TokenLogprob(output.token_id, output.logprob, output.top_logprobs, start)
            )
        released = self._stops.push(text)
        if not self._stops.is_stopped and ends:
            released += self._stops.finish()
        self._num_released += len(released)
        return self._piece(released, output.finish_reason)

    def _piece(self, text: str, finish_reason: FinishReason | None) -> Piece:
        self.is_finished = self._stops.is_stopped or finish_reason is not None
        if self._stops.is_stopped:
            finish_reason = "stop"
        is_whole = self.is_finished and not self._stops.is_stopped
        out = [token for token in self._held if token.offset < self._num_released or is_whole]
        self._held = self._held[len(out) :]
        return Piece(text, out, finish_reason)
