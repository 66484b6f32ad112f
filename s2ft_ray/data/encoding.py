"""A valid row as tokens and targets.

Invariant: the tokens of a row begin with exactly the tokens that inference has before it answers
(``encode_prompt``), even where a token of the whole text would reach over that edge; BOS stands
there once where the tokenizer (or, in chats, the template) puts one; and no row leaves here
without a target.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from s2ft_ray.data.chat import ChatError, Span, render_chat
from s2ft_ray.data.formats import REQUIRED_KEYS, Format, as_text, as_turns, bos_ids
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


@dataclass(frozen=True)
class _Text:
    """A row as text, with its targets as spans of characters."""

    text: str
    spans: list[Span]
    prompt_end: int
    is_chat: bool

    @property
    def targets_reach_the_end(self) -> bool:
        """Whether all is target from the prompt's end on, or from the text's start."""
        return self.spans in ([(0, len(self.text))], [(self.prompt_end, len(self.text))])


@dataclass(frozen=True)
class RowFault:
    """Why a row that has the right form can't be trained on."""

    text: str


class Encoder:
    """Encodes rows for one tokenizer, as the run's config wants them.

    Raises ConfigError for a tokenizer that can't do it: without an end token, or without offsets.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, max_seq_len: int, train_on: TrainOn
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
        self._max_seq_len = max_seq_len
        self._train_on = train_on
        self._eos = tokenizer.eos_token_id
        self._bos = bos_ids(tokenizer)  # an ordinary call: no truncation or padding is left set
        self._backend = tokenizer.backend_tokenizer  # half the time of the ordinary call
        self._newline = self._encode(["\n"])[0]

    def encode(
        self, rows: Sequence[Mapping[str, Any]], row_format: Format
    ) -> list[EncodedRow | RowFault]:
        """Encode valid rows; in the place of one that can't be trained on stands its fault."""
        if row_format == "chat" and self.tokenizer.chat_template is None:
            raise ConfigError(
                "data.chat_template: is needed: the rows are chats, and the tokenizer of this base"
                " has no chat template; give a Jinja template or a file that holds one"
            )
        rendered = [self._render(fields, row_format) for fields in rows]
        texts = [row for row in rendered if isinstance(row, _Text)]
        prompts = self._encode([row.text[: row.prompt_end] for row in texts])
        # Offsets cost 40% more time: only where a target span ends before the text does.
        with_offsets = not all(row.targets_reach_the_end for row in texts)
        encode = self._backend.encode_batch if with_offsets else self._backend.encode_batch_fast
        wholes = encode([row.text for row in texts], add_special_tokens=False)
        tokens = iter(zip(prompts, wholes, strict=True))
        return [
            row if isinstance(row, RowFault) else self._finish(row, *next(tokens), row_format)
            for row in rendered
        ]

    def _render(self, fields: Mapping[str, Any], row_format: Format) -> _Text | RowFault:
        turns = as_turns(fields, row_format, self.tokenizer)
        if turns is None:
            prompt, completion = as_text(fields, row_format)
            text = prompt + completion
            return self._with_targets(text, [(len(prompt), len(text))], len(prompt), is_chat=False)
        try:
            chat = render_chat(turns, self.tokenizer, every_answer=self._train_on == "assistant")
        except ChatError as error:
            return RowFault(f"{REQUIRED_KEYS[row_format][-1]}: {error}")
        return self._with_targets(chat.text, chat.answers, chat.prompt_end, is_chat=True)

    def _with_targets(
        self, text: str, answers: list[Span], prompt_end: int, *, is_chat: bool
    ) -> _Text:
        spans = [(0, len(text))] if self._train_on == "all" else answers
        return _Text(text, spans, prompt_end, is_chat)

    def _finish(
        self, row: _Text, prompt: list[int], whole: Encoding, row_format: Format
    ) -> EncodedRow | RowFault:
        ids, prompt_len = whole.ids, len(prompt)
        mask: list[bool] | None = None
        if ids[:prompt_len] == prompt:
            if row.targets_reach_the_end:
                first = 0 if row.spans[0][0] == 0 else prompt_len
                mask = [False] * first + [True] * (len(ids) - first)
            else:
                mask = _mark(whole, row.spans)
        if mask is None:
            ids, mask, prompt_len = self._encode_pieces(row)
        if not row.is_chat:
            if ids[: len(self._bos)] != self._bos:
                ids, mask, prompt_len = self._bos + ids, [False, *mask], prompt_len + 1
            if ids[-1] != self._eos:
                ids, mask = [*ids, self._eos], [*mask, True]
        return self._truncate(ids, mask, prompt_len, REQUIRED_KEYS[row_format][-1])

    def _truncate(
        self, ids: list[int], mask: list[bool], prompt_len: int, key: str
    ) -> EncodedRow | RowFault:
        limit = self._max_seq_len
        mask[0] = False  # nothing comes before it that could predict it
        if not any(mask[:limit]):
            if len(ids) <= limit:
                return RowFault(f"{key}: has no target token; write a longer answer")
            return RowFault(
                f"{key}: no target token is left: {prompt_len} of the row's {len(ids)} tokens are"
                f" prompt, and data.max_seq_len is {limit}; raise it, or shorten the prompt"
            )
        return EncodedRow(ids[:limit], mask[:limit], min(prompt_len, limit), len(ids) > limit)

    def _encode_pieces(self, row: _Text) -> tuple[list[int], list[bool], int]:
        """Encode what lies between two edges by itself; returns tokens, mask and prompt length."""
        edges = sorted({0, row.prompt_end, len(row.text), *itertools.chain(*row.spans)})
        ids: list[int] = []
        mask: list[bool] = []
        prompt_len = 0
        for start, end in itertools.pairwise(edges):
            piece = row.text[start:end]
            piece_ids = self._encode_after(piece) if start else self._encode([piece])[0]
            is_target = any(s <= start and end <= e for s, e in row.spans)
            ids += piece_ids
            mask += [is_target] * len(piece_ids)
            prompt_len += len(piece_ids) if end <= row.prompt_end else 0
        return ids, mask, prompt_len

    def _encode_after(self, piece: str) -> list[int]:
        """Encode text that other text precedes: SentencePiece puts a space before a first word."""
        after_newline = self._encode(["\n" + piece])[0]
        if after_newline[: len(self._newline)] == self._newline:
            return after_newline[len(self._newline) :]
        return self._encode([piece])[0]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]


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
