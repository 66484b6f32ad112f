"""From token ids back to text, piece by piece.

Invariant: the pieces of an answer put together are what the tokenizer makes of all its tokens at
once behind the end of the prompt. A character of several tokens comes with its last one.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Each piece is decoded behind the piece before it alone, so its cost doesn't grow with the answer;
# the first behind so much of the prompt, where tokenizers would else drop a leading space.
_CONTEXT_TOKENS = 6
_REPLACEMENT = "�"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")


class Detokenizer:
    """One answer's tokens to text. `prompt_ids` is what it continues."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids[-_CONTEXT_TOKENS:])
        self._prefix = 0  # what is decoded with each piece, and cut off again
        self._read = len(self._ids)  # what has come out as text

    def push(self, token_id: int) -> str:
        """Return the text that is certain with this token; empty inside a character."""
        self._ids.append(token_id)
        return self._advance(final=False)

    def finish(self) -> str:
        """Return what is left: half a character, as the replacement character."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        before = self._decode(self._ids[self._prefix : self._read])
        now = self._decode(self._ids[self._prefix :])
        if len(now) <= len(before) or (now.endswith(_REPLACEMENT) and not final):
            return ""
        self._prefix = self._read
        self._read = len(self._ids)
        return now[len(before) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return decode(self._tokenizer, ids)


def decode(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    """Return the text of `ids` as it was generated: no special tokens, no spaces tidied."""
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


class TokenTexts:
    """How single tokens are shown beside their logprobs."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = getattr(backend, "decoder", None)
        self._is_byte_level = decoder is not None and "ByteLevel" in repr(decoder)

    def bytes_of(self, token_id: int) -> bytes:
        """Return the token's UTF-8 bytes, which may be a part of a character."""
        token = str(self._tokenizer.convert_ids_to_tokens(token_id))
        byte = _BYTE_TOKEN.match(token)
        if byte:
            return bytes([int(byte.group(1), 16)])
        if token_id in self._tokenizer.all_special_ids:
            return token.encode()
        if self._is_byte_level and all(char in _byte_level() for char in token):
            return bytes(_byte_level()[char] for char in token)
        if "▁" in token:
            return token.replace("▁", " ").encode()
        return str(self._tokenizer.decode([token_id])).encode()

    def text_of(self, token_id: int) -> str:
        """Return the token as text; ``bytes:\\x..`` where it is no whole character."""
        raw = self.bytes_of(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


@lru_cache(maxsize=1)
def _byte_level() -> dict[str, int]:
    # GPT-2's table: printable bytes stand for themselves, the others are moved above 255
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in printable}
    moved = (byte for byte in range(256) if byte not in printable)
    return table | {chr(256 + place): byte for place, byte in enumerate(moved)}
