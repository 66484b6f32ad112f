"""Sampling: each row by its own rules, draws by its own seed, raw logprobs, JSON by its schema."""

import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_worlds import tokenizer
from torch import Tensor

from s2ft_ray.errors import ConfigError
from s2ft_ray.serving.grammar import Grammars
from s2ft_ray.serving.requests import SamplingParams
from s2ft_ray.serving.sampling import RequestSampler, choose

VOCAB = 50


def logits(rows: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def sampler(**params: object) -> RequestSampler:
    return RequestSampler(SamplingParams(**params))  # type: ignore[arg-type]


def frequencies(row: Tensor, count: int, **params: object) -> Tensor:
    drawn = [choose([sampler(seed=i, **params)], row[None])[0] for i in range(count)]
    return torch.bincount(torch.tensor(drawn), minlength=VOCAB) / count


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"top_k": 1}, {"temperature": 1e-9}])
def test_no_temperature_takes_the_likeliest(params: dict[str, float]) -> None:
    rows = logits(4)
    samplers = [sampler(seed=i, **params) for i in range(4)]
    assert choose(samplers, rows) == rows.argmax(-1).tolist()


def test_draws_follow_the_distribution() -> None:
    row = logits(1)[0]
    got = frequencies(row, 3000, temperature=2.0)
    assert (got - (row / 2).softmax(-1)).abs().max() < 0.03


def test_top_k_and_top_p_cut() -> None:
    row = logits(1)[0]
    order = row.argsort(descending=True)
    assert set(frequencies(row, 300, temperature=5.0, top_k=3).nonzero()[:, 0].tolist()) == set(
        order[:3].tolist()
    )
    num_kept = int((row.softmax(-1)[order].cumsum(-1) < 0.6).sum()) + 1
    kept = frequencies(row, 500, top_p=0.6).nonzero()[:, 0].tolist()
    assert set(kept) <= set(order[:num_kept].tolist())
    assert set(frequencies(row, 20, top_p=1e-6).nonzero()[:, 0].tolist()) == {int(order[0])}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**63), st.integers(1, 12), st.integers(0, 1000))
def test_a_seed_draws_the_same_in_any_mix(seed: int, num_others: int, order: int) -> None:
    shuffle = random.Random(order)
    kinds = [{}, {"top_k": 5}, {"top_p": 0.8}, {"temperature": 0.0}, {"frequency_penalty": 1.0}]
    mine = {"seed": seed, "temperature": 1.3, **shuffle.choice(kinds[:3])}
    steps = [logits(1, step) for step in range(4)]
    alone = sampler(**mine)
    wanted = [choose([alone], rows)[0] for rows in steps]
    again = sampler(**mine)
    others = [sampler(seed=i, **shuffle.choice(kinds)) for i in range(num_others)]
    got = []
    for rows in steps:
        crowd = [again, *shuffle.sample(others, shuffle.randint(0, num_others))]
        shuffle.shuffle(crowd)
        place = crowd.index(again)
        mixed = logits(len(crowd), 99)
        mixed[place] = rows[0]
        got.append(choose(crowd, mixed)[place])
    assert got == wanted


def test_penalties_push_away_what_was_there() -> None:
    row = torch.zeros(1, VOCAB)
    row[0, 7], row[0, 8], row[0, 9] = 3.0, 2.5, 2.2
    one = sampler(temperature=0.0, presence_penalty=0.6)
    assert [choose([one], row)[0] for _ in range(4)] == [7, 8, 7, 7]
    often = sampler(temperature=0.0, frequency_penalty=0.6)
    assert [choose([often], row)[0] for _ in range(4)] == [7, 8, 7, 9]


def test_logprobs_are_raw_and_the_logits_are_left_alone() -> None:
    rows = logits(3)
    before = rows.clone()
    asked = sampler(seed=1, temperature=0.3, presence_penalty=1.0, top_k=2, logprobs=4)
    only = sampler(seed=2, logprobs=0)
    none = sampler(seed=3)
    for _ in range(3):
        tokens = choose([asked, only, none], rows)
    raw = before.log_softmax(-1)
    output = asked.outputs[-1]
    assert output.logprob == pytest.approx(float(raw[0, tokens[0]]), abs=1e-6)
    assert [token for token, _ in output.top_logprobs] == raw[0].topk(4).indices.tolist()
    assert only.outputs[-1].logprob is not None
    assert only.outputs[-1].top_logprobs == ()
    assert none.outputs[-1].logprob is None
    assert torch.equal(rows, before)


def test_random_tokens_under_a_grammar_are_json_that_fits() -> None:
    schema = {
        "type": "object",
        "properties": {
            "kind": {"enum": ["cat", "dog"]},
            "ages": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
        },
        "required": ["kind", "ages"],
        "additionalProperties": False,
    }
    size = len(tokenizer())
    grammars = Grammars(tokenizer(), size + 5)  # models pad their vocabulary
    finished = 0
    for seed in range(12):
        one = RequestSampler(SamplingParams(seed=seed), grammars.compile(schema))
        tokens: list[int] = []
        while len(tokens) < 120 and (not tokens or tokens[-1] != tokenizer().eos_token_id):
            tokens += choose([one], torch.zeros(1, size + 5))
        assert one.fault is None
        if tokens[-1] == tokenizer().eos_token_id:
            finished += 1
            value = json.loads(tokenizer().decode(tokens, skip_special_tokens=True))
            assert value["kind"] in ("cat", "dog")
            assert all(isinstance(age, int) for age in value["ages"])
    assert finished


@pytest.mark.parametrize(
    "schema", [{"type": "nonsense"}, {"$ref": "#/nowhere"}, {"type": "string", "pattern": "("}]
)
def test_a_schema_that_is_none_is_refused(schema: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="json_schema"):
        Grammars(tokenizer(), 768).compile(schema)
