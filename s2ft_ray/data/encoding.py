"""A valid row as tokens and targets.

Invariant: the tokens of a row begin with exactly the tokens that inference has before it answers
(``encode_prompt``), even where a token of the whole text would reach over that edge; BOS stands
there once where the tokenizer (or, in chats, the template) puts one; and no row leaves here
without a target.

Literal rows are encoded as prompt and completion. On 3,257 rows with three tokenizers, cut at
random places, that gave the tokens of the whole text wherever no token reached over the cut, in
two thirds of the time. Chats are encoded whole: what follows a special token depends on it.
"""

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import numpy as np
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from s2ft_ray.data.chat import ChatError, RenderedChat, Span, render_chat
from s2ft_ray.data.formats import (
    REQUIRED_KEYS,
    Format,
    as_text,
    as_turns,
    bos_ids,
    is_chat_prompt,
)
from s2ft_ray.errors import ConfigError

TrainOn = Literal["completion", "assistant", "all"]


@dataclass(frozen=True)
class EncodedRow:
    """A row of at most ``max_seq_len`` tokens."""

    input_ids: list[int]
    target_mask: list[bool]
    prompt_len: int
    """How many tokens stand before the last completion."""
    is_truncated: bool
    rejected_ids: list[int] = field(default_factory=list)
    """Of a preference row: the prompt with the other answer, and its targets."""
    rejected_mask: list[bool] = field(default_factory=list)
    weight: float = 1.0


@dataclass(frozen=True)
class RowFault:
    """Why a row that has the right form can't be trained on."""

    text: str


class Encoder:
    """Encodes rows for one tokenizer, as the run's config wants them.

    Raises ConfigError for a tokenizer that can't do it: without an end token, or without offsets.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_seq_len: int,
        train_on: TrainOn,
        weight_key: str | None = None,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                "model.name_or_path: its tokenizer has no eos_token, so a completion has no end;"
                " set eos_token in tokenizer_config.json"
            )
        if not tokenizer.is_fast:
            raise ConfigError(
                f"model.name_or_path: its tokenizer ({type(tokenizer).__name__}) can't tell which"
                " characters a token covers; choose a base with a tokenizer.json"
            )
        self.tokenizer = tokenizer
        self.weight_key = weight_key
        self._max_seq_len = max_seq_len
        self._train_on = train_on
        self._eos = tokenizer.eos_token_id
        self._bos = bos_ids(tokenizer)  # an ordinary call: no truncation or padding is left set
        self._backend = tokenizer.backend_tokenizer  # half the time of the ordinary call
        self._newline = self._encode(["\n"])[0]

    @property
    def identity(self) -> str:
        """A digest of all that this encoder is made of: the same rows become the same tokens."""
        parts = (
            self._backend.to_str(),
            str(self.tokenizer.chat_template),
            f"{self._bos} {self._eos} {self._max_seq_len} {self._train_on} {self.weight_key}",
        )
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def encode(
        self, rows: Sequence[Mapping[str, Any]], row_format: Format
    ) -> list[EncodedRow | RowFault]:
        """Encode valid rows; in the place of one that can't be trained on stands its fault."""
        is_chat = row_format == "chat" or any(map(is_chat_prompt, rows))
        if is_chat and self.tokenizer.chat_template is None:
            raise ConfigError(
                "data.chat_template: is needed: the rows are chats, and the tokenizer of this base"
                " has no chat template; give a Jinja template or a file that holds one"
            )
        if row_format == "chat" or (row_format == "instruction" and self.tokenizer.chat_template):
            return self._encode_chats(rows, row_format)
        if row_format == "preference":
            return self._encode_pairs(rows)
        return self._encode_literal(rows, row_format)

    def _encode_pairs(self, rows: Sequence[Mapping[str, Any]]) -> list[EncodedRow | RowFault]:
        """Encode each answer after the prompt."""
        sides = [self._encode_answers(rows, key) for key in ("chosen", "rejected")]
        pairs: list[EncodedRow | RowFault] = []
        for chosen, rejected in zip(*sides, strict=True):
            if isinstance(chosen, RowFault):
                pairs.append(chosen)
            elif isinstance(rejected, RowFault):
                pairs.append(rejected)
            else:
                pairs.append(
                    replace(
                        chosen,
                        rejected_ids=rejected.input_ids,
                        rejected_mask=rejected.target_mask,
                        is_truncated=chosen.is_truncated or rejected.is_truncated,
                    )
                )
        return pairs

    def _encode_answers(
        self, rows: Sequence[Mapping[str, Any]], key: str
    ) -> list[EncodedRow | RowFault]:
        """Encode one answer of each pair, by the chat template where the prompt is turns."""
        chats = [
            {"messages": [*row["prompt"], {"role": "assistant", "content": row[key]}]}
            for row in rows
            if is_chat_prompt(row)
        ]
        texts = [
            {"prompt": row["prompt"], "completion": row[key]}
            for row in rows
            if not is_chat_prompt(row)
        ]
        of_chats = iter(self._encode_chats(chats, "chat") if chats else [])
        of_texts = iter(self._encode_literal(texts, "completion") if texts else [])
        encoded = [next(of_chats if is_chat_prompt(row) else of_texts) for row in rows]
        return [
            RowFault(f"{key}:{one.text.partition(':')[2]}") if isinstance(one, RowFault) else one
            for one in encoded
        ]

    def _encode_literal(
        self, rows: Sequence[Mapping[str, Any]], row_format: Format
    ) -> list[EncodedRow | RowFault]:
        texts = [as_text(fields, row_format) for fields in rows]
        prompts = self._encode([prompt for prompt, _ in texts])
        encoded: list[EncodedRow | RowFault] = []
        for prompt, completion in zip(prompts, self._encode_after(texts), strict=True):
            ids = prompt + completion
            bos = [] if ids[: len(self._bos)] == self._bos else self._bos
            eos = [] if ids[-1] == self._eos else [self._eos]
            prompt_len = len(bos) + len(prompt)
            mask = [False] * len(bos) + [self._train_on == "all"] * len(prompt)
            mask += [True] * (len(completion) + len(eos))
            encoded.append(self._cut(bos + ids + eos, mask, prompt_len, row_format))
        return encoded

    def _encode_chats(
        self, rows: Sequence[Mapping[str, Any]], row_format: Format
    ) -> list[EncodedRow | RowFault]:
        chats = [self._render(fields, row_format) for fields in rows]
        rendered = [chat for chat in chats if isinstance(chat, RenderedChat)]
        prompts = iter(self._encode([chat.text[: chat.prompt_end] for chat in rendered]))
        wholes = iter(
            self._backend.encode_batch([chat.text for chat in rendered], add_special_tokens=False)
        )
        encoded: list[EncodedRow | RowFault] = []
        for chat in chats:
            if isinstance(chat, RowFault):
                encoded.append(chat)
                continue
            prompt, whole = next(prompts), next(wholes)
            spans = [(0, len(chat.text))] if self._train_on == "all" else chat.answers
            mask = _mark(whole, spans) if whole.ids[: len(prompt)] == prompt else None
            if mask is None:
                ids, mask, prompt_len = self._encode_pieces(chat, spans)
            else:
                ids, prompt_len = whole.ids, len(prompt)
            encoded.append(self._cut(ids, mask, prompt_len, row_format))
        return encoded

    def _render(self, fields: Mapping[str, Any], row_format: Format) -> RenderedChat | RowFault:
        turns = as_turns(fields, row_format, self.tokenizer)
        assert turns is not None
        try:
            return render_chat(turns, self.tokenizer, every_answer=self._train_on == "assistant")
        except ChatError as error:
            return RowFault(f"{_answer_key(row_format)}: {error}")

    def _cut(
        self, ids: list[int], mask: list[bool], prompt_len: int, row_format: Format
    ) -> EncodedRow | RowFault:
        limit = self._max_seq_len
        mask[0] = False  # nothing comes before it that could predict it
        if not any(mask[:limit]):
            key = _answer_key(row_format)
            if len(ids) <= limit:
                return RowFault(f"{key}: has no target token; write a longer answer")
            return RowFault(
                f"{key}: no target token is left: {prompt_len} of the row's {len(ids)} tokens are"
                f" prompt, and data.max_seq_len is {limit}; raise it, or shorten the prompt"
            )
        return EncodedRow(ids[:limit], mask[:limit], min(prompt_len, limit), len(ids) > limit)

    def _encode_pieces(
        self, chat: RenderedChat, spans: list[Span]
    ) -> tuple[list[int], list[bool], int]:
        """Encode what lies between two edges by itself; returns tokens, mask and prompt length."""
        edges = sorted({0, chat.prompt_end, len(chat.text), *itertools.chain(*spans)})
        pieces = list(itertools.pairwise(edges))
        texts = [(chat.text[:start], chat.text[start:end]) for start, end in pieces]
        ids: list[int] = []
        mask: list[bool] = []
        prompt_len = 0
        for (start, end), piece in zip(pieces, self._encode_after(texts), strict=True):
            is_target = any(s <= start and end <= e for s, e in spans)
            ids += piece
            mask += [is_target] * len(piece)
            prompt_len += len(piece) if end <= chat.prompt_end else 0
        return ids, mask, prompt_len

    def _encode_after(self, texts: list[tuple[str, str]]) -> list[list[int]]:
        """Encode the second text of each pair as it reads after the first.

        By itself it would get the space that SentencePiece puts before a first word, so it is
        encoded after a line break, whose tokens are taken off again.
        """
        encoded = self._encode(["\n" + text if before else text for before, text in texts])
        width = len(self._newline)
        for index, (before, text) in enumerate(texts):
            if before and encoded[index][:width] == self._newline:
                encoded[index] = encoded[index][width:]
            elif before:  # the line break became one token with what follows
                encoded[index] = self._encode([text])[0]
        return encoded

    def _encode(self, texts: list[str]) -> list[list[int]]:
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]


def _answer_key(row_format: Format) -> str:
    return REQUIRED_KEYS[row_format][-1]


def _mark(encoding: Encoding, spans: list[Span]) -> list[bool] | None:
    """Mark the tokens inside the spans of characters; None where one reaches over an edge."""
    starts, ends = np.array(encoding.offsets).T
    mask = np.zeros(len(starts), dtype=bool)
    for start, end in spans:
        touching = (starts < end) & (ends > start)
        if (touching & ((starts < start) | (ends > end))).any():
            return None
        mask |= touching
    return cast(list[bool], mask.tolist())
