"""Tokens to text: pieces that add up, stop texts across borders, logprobs in step."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from s2ft_ray.bases import load_tokenizer
from s2ft_ray.config import ModelConfig
from s2ft_ray.serving.answers import Answer
from s2ft_ray.serving.detokenizer import Detokenizer, TokenTexts, decode
from s2ft_ray.serving.requests import TokenOutput
from s2ft_ray.serving.stops import StopMatcher


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(ModelConfig())


@pytest.fixture(scope="module")
def sentencepiece() -> PreTrainedTokenizerBase:
    """Llama's kind: words that begin with U+2581, bytes as tokens of their own."""
    words = ["<s>", "▁hello", "▁world", "hello", "!", *(f"<0x{i:02X}>" for i in range(256))]
    model = models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def pieces_of(tokenizer: PreTrainedTokenizerBase, prompt: list[int], ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt)
    return [*(detokenizer.push(token) for token in ids), detokenizer.finish()]


@given(text=st.text(max_size=60), cut=st.integers(0, 10))
@settings(max_examples=200, deadline=None)
def test_pieces_add_up_to_the_text(tokenizer: PreTrainedTokenizerBase, text: str, cut: int) -> None:
    ids = tokenizer("ab " + text, add_special_tokens=False)["input_ids"]
    cut = min(cut, len(ids) - 1) + 1
    while decode(tokenizer, ids[:cut]).endswith("\ufffd"):
        cut -= 1
    whole = decode(tokenizer, ids)
    pieces = pieces_of(tokenizer, ids[:cut], ids[cut:])
    assert decode(tokenizer, ids[:cut]) + "".join(pieces) == whole


def test_random_tokens_come_out_as_the_tokenizer_decodes_them(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    draw = random.Random(0)
    for _ in range(100):
        ids = [draw.randrange(3, len(tokenizer)) for _ in range(40)]
        assert "".join(pieces_of(tokenizer, [], ids)) == decode(tokenizer, ids)


def test_a_character_of_several_tokens_comes_with_its_last(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    ids = tokenizer("🦙", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1
    assert pieces_of(tokenizer, [], ids) == [*[""] * (len(ids) - 1), "🦙", ""]


def test_half_a_character_at_the_end_is_the_replacement_character(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    ids = tokenizer("🦙", add_special_tokens=False)["input_ids"][:-1]
    assert "".join(pieces_of(tokenizer, [], ids)) == decode(tokenizer, ids)


def test_a_leading_space_survives_where_the_tokenizer_strips_it(
    sentencepiece: PreTrainedTokenizerBase,
) -> None:
    hello, world = 1, 2
    assert decode(sentencepiece, [world]) == "world"
    assert "".join(pieces_of(sentencepiece, [hello], [world])) == " world"


def test_tokens_are_shown_by_their_bytes(
    tokenizer: PreTrainedTokenizerBase, sentencepiece: PreTrainedTokenizerBase
) -> None:
    for text in ("order", " 42", "é", "🦙"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert b"".join(map(TokenTexts(tokenizer).bytes_of, ids)) == text.encode()
    texts = TokenTexts(sentencepiece)
    assert texts.bytes_of(1) == b" hello"
    assert texts.text_of(5 + 0xE2) == "bytes:\\xe2"


@given(
    text=st.text(alphabet="abc", max_size=30),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=4),
    cuts=st.lists(st.integers(1, 4), max_size=30),
)
def test_a_text_is_cut_at_its_first_stop_however_it_is_sliced(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    # of several the one that is whole first: generation would have ended with it
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(found)[1]] if found else text
    matcher, out, rest = StopMatcher(stops), "", text
    for cut in [*cuts, len(text)]:
        if matcher.is_stopped:
            break
        out, rest = out + matcher.push(rest[:cut]), rest[cut:]
        assert expected.startswith(out)
    if not matcher.is_stopped:
        out += matcher.finish()
    assert out == expected
    assert matcher.is_stopped == bool(found)


def feed(answer: Answer, ids: list[int]) -> tuple[str, list[int], str | None]:
    text, tokens, reason = "", [], None
    for place, token in enumerate(ids):
        last = "length" if place == len(ids) - 1 else None
        piece = answer.push(TokenOutput(token, -0.5, (), last))
        text += piece.text
        tokens += [shown.token_id for shown in piece.tokens]
        reason = piece.finish_reason or reason
        if answer.is_finished:
            break
    return text, tokens, reason


def test_an_answer_ends_before_its_stop_text_and_so_do_its_logprobs(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    ids = tokenizer("one two STOP three", add_special_tokens=False)["input_ids"]
    text, tokens, reason = feed(Answer(tokenizer, [], ["STOP"]), ids)
    assert (text, reason) == ("one two ", "stop")
    assert decode(tokenizer, tokens).startswith("one two")
    assert "STOP" not in decode(tokenizer, tokens)


def test_what_only_looked_like_a_stop_text_comes_out(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer("one STO", add_special_tokens=False)["input_ids"]
    text, tokens, reason = feed(Answer(tokenizer, [], ["STOP"]), ids)
    assert (text, tokens, reason) == ("one STO", ids, "length")


def test_the_end_token_is_counted_but_no_part_of_the_answer(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    answer = Answer(tokenizer, [])
    end = tokenizer.eos_token_id
    piece = answer.push(TokenOutput(end, -0.1, (), "stop"))
    assert (piece.text, piece.tokens, piece.finish_reason) == ("", [], "stop")
    assert answer.num_tokens == 1
    assert answer.is_finished


def test_offsets_count_the_characters_before_each_token(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    ids = tokenizer("one two", add_special_tokens=False)["input_ids"]
    answer = Answer(tokenizer, [])
    shown = [token for i in ids for token in answer.push(TokenOutput(i, -1.0)).tokens]
    assert [token.offset for token in shown] == [
        len(decode(tokenizer, ids[:place])) for place in range(len(ids))
    ]
