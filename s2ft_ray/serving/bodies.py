"""Answers as OpenAI writes them: whole bodies, and the chunks of a stream.

Invariant: every body and chunk of a request has its id, its time, the model as it was named, and as
``system_fingerprint`` the fingerprint of the adapter (for a base: the base's) that answered.
"""

import json
from dataclasses import dataclass
from typing import Any

from s2ft_ray.serving.answers import Piece, TokenLogprob
from s2ft_ray.serving.detokenizer import TokenTexts

DONE = "data: [DONE]\n\n"


@dataclass(frozen=True)
class Identity:
    """What all bodies of one request share."""

    id: str
    created: int
    model: str
    fingerprint: str


@dataclass(frozen=True)
class Usage:
    """Tokens that a request took."""

    prompt_tokens: int
    completion_tokens: int

    def to_json(self) -> dict[str, int]:
        """Return OpenAI's ``usage``."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


class CompletionBodies:
    """``/v1/completions``."""

    kind = "text_completion"

    def __init__(self, identity: Identity, texts: TokenTexts, wants_logprobs: bool) -> None:
        self._identity = identity
        self._texts = texts
        self._wants_logprobs = wants_logprobs

    def first(self, index: int) -> dict[str, Any] | None:
        """Return nothing: a completion's stream begins with its text."""
        del index
        return None

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return one chunk of a stream."""
        return _head(self._identity, self.kind) | {"choices": [self.choice(index, piece)]}

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return one choice, whole or a piece of it."""
        return {
            "index": index,
            "text": piece.text,
            "logprobs": self._logprobs(piece.tokens) if self._wants_logprobs else None,
            "finish_reason": piece.finish_reason,
        }

    def _logprobs(self, tokens: list[TokenLogprob]) -> dict[str, Any]:
        return {
            "tokens": [self._texts.text_of(token.token_id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }

    def _top(self, token: TokenLogprob) -> dict[str, float] | None:
        if token.logprob is None:
            return None
        top: dict[str, float] = {}
        for token_id, logprob in (*token.top, (token.token_id, token.logprob)):
            top.setdefault(self._texts.text_of(token_id), logprob)
        return top


class ChatBodies:
    """``/v1/chat/completions``."""

    kind = "chat.completion"

    def __init__(self, identity: Identity, texts: TokenTexts, wants_logprobs: bool) -> None:
        self._identity = identity
        self._texts = texts
        self._wants_logprobs = wants_logprobs

    def first(self, index: int) -> dict[str, Any] | None:
        """Return the chunk that opens a choice: the role."""
        return self._chunk(index, {"role": "assistant", "content": ""}, Piece())

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return one chunk of a stream."""
        delta = {"content": piece.text} if piece.text else {}
        return self._chunk(index, delta, piece)

    def _chunk(self, index: int, delta: dict[str, Any], piece: Piece) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(piece.tokens),
            "finish_reason": piece.finish_reason,
        }
        return _head(self._identity, "chat.completion.chunk") | {"choices": [choice]}

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return one whole choice."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": self._logprobs(piece.tokens),
            "finish_reason": piece.finish_reason,
        }

    def _logprobs(self, tokens: list[TokenLogprob]) -> dict[str, Any] | None:
        if not self._wants_logprobs:
            return None
        content = [
            self._token(token.token_id, token.logprob)
            | {"top_logprobs": [self._token(*pair) for pair in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        raw = self._texts.bytes_of(token_id)
        text = raw.decode(errors="replace")
        return {"token": text, "logprob": logprob, "bytes": list(raw)}


Bodies = CompletionBodies | ChatBodies


def whole(bodies: Bodies, identity: Identity, choices: list[Piece], usage: Usage) -> str:
    """Return the body of a request that isn't streamed."""
    body = _head(identity, bodies.kind) | {
        "choices": [bodies.choice(index, piece) for index, piece in enumerate(choices)],
        "usage": usage.to_json(),
    }
    return _dumps(body)


def usage_chunk(bodies: Bodies, identity: Identity, usage: Usage) -> str:
    """Return the last chunk of a stream whose request asked for its usage."""
    kind = "chat.completion.chunk" if isinstance(bodies, ChatBodies) else bodies.kind
    return event(_head(identity, kind) | {"choices": [], "usage": usage.to_json()})


def event(body: dict[str, Any]) -> str:
    """Return one server-sent event."""
    return f"data: {_dumps(body)}\n\n"


def _head(identity: Identity, kind: str) -> dict[str, Any]:
    return {
        "id": identity.id,
        "object": kind,
        "created": identity.created,
        "model": identity.model,
        "system_fingerprint": identity.fingerprint,
    }


def _dumps(body: dict[str, Any]) -> str:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
