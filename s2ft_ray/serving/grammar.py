"""JSON that fits a schema, token by token, by llguidance.

Invariant: after every token that the grammar allows, the text can still become a document that
fits; the end token is allowed where it is one. White space stands nowhere but in strings.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from s2ft_ray.errors import ConfigError, ServingError

_NUM_KEPT = 64  # compiled schemas; one takes about a megabyte at most
# Free white space lets a model fill its whole answer with it.
_COMPACT: dict[str, Any] = {"whitespace_flexible": False}


class Grammar:
    """Where one request is in its document."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def mask(self, logits: Tensor) -> None:
        """Set what may not come next to -inf, in place. logits: [V]."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise ServingError(f"json_schema: {self._matcher.get_error()}")
        allowed = np.unpackbits(bits, bitorder="little", count=min(len(bits) * 8, len(logits)))
        forbidden = torch.from_numpy(allowed == 0).to(logits.device)
        logits[: len(forbidden)].masked_fill_(forbidden, -torch.inf)
        logits[len(forbidden) :] = -torch.inf

    def advance(self, token_id: int) -> None:
        """Take a token into the document."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token_id)


class Grammars:
    """The grammars of one tokenizer, compiled once for each schema."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
        """`vocab_size` is the model's: at least the tokenizer's."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._wrapped: LLTokenizer | None = None
        self._kept: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, schema: Mapping[str, Any]) -> Grammar:
        """Return a fresh grammar for a schema; an empty one allows any JSON. From any thread.

        ConfigError for a schema that isn't one, or that asks for what llguidance can't hold to.
        """
        text = json.dumps(schema, sort_keys=True)
        with self._lock:
            matcher = self._kept.get(text)
            if matcher is None:
                matcher = self._kept[text] = self._build(text)
                if len(self._kept) > _NUM_KEPT:
                    self._kept.popitem(last=False)
            return Grammar(matcher.deep_copy())

    def _build(self, schema: str) -> LLMatcher:
        if self._wrapped is None:  # half a second for a large vocabulary: not before it is wanted
            try:
                self._wrapped = from_tokenizer(self._tokenizer, n_vocab=self._vocab_size)
            except ValueError as error:
                raise ConfigError(
                    f"json_schema: not with this model's tokenizer: {error}"
                ) from error
        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides=_COMPACT)  # type: ignore[arg-type]
        except ValueError as error:
            raise ConfigError(f"json_schema: {error}") from error
        matcher = LLMatcher(self._wrapped, grammar, log_level=0)
        if matcher.is_error():
            raise ConfigError(f"json_schema: {matcher.get_error()}")
        return matcher
