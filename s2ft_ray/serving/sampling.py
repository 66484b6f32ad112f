"""How each request's next token is taken from the logits.

Invariant: what a request gets is a function of its own logits, parameters and seed. Its draws come
from a generator of its own, one for each token, and every step treats its row alone, so the same
seed gives the same tokens in whatever mix it is served.

Dimensions: N requests, V vocabulary.
"""

import random
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from s2ft_ray.errors import ServingError
from s2ft_ray.serving.grammar import Grammar
from s2ft_ray.serving.requests import SamplingParams, TokenOutput, TopLogprobs


class RequestSampler:
    """One request's parameters, its draws, and what it was given so far."""

    def __init__(self, params: SamplingParams, grammar: Grammar | None = None) -> None:
        self.params = params
        self.grammar = grammar
        self.outputs: list[TokenOutput] = []
        """One for each token; their finish_reason is for the engine to say."""
        self.fault: str | None = None
        """Why it can't go on: its grammar's failure, which is nobody else's."""
        self._random = random.Random(params.seed)
        self._counts: Counter[int] = Counter()

    @property
    def is_greedy(self) -> bool:
        """Whether it takes the likeliest token."""
        return self.params.temperature == 0 or self.params.top_k == 1

    @property
    def changes_logits(self) -> bool:
        """Whether penalties or a grammar come before the choice."""
        return self.grammar is not None or (self._has_penalties and bool(self._counts))

    def change(self, logits: Tensor) -> None:
        """Put penalties and the grammar on the request's own row [V], in place."""
        if self._has_penalties and self._counts:
            tokens = torch.tensor(list(self._counts), device=logits.device)
            counts = torch.tensor(list(self._counts.values()), device=logits.device)
            penalty = self.params.presence_penalty + self.params.frequency_penalty * counts
            logits[tokens] -= penalty.to(logits.dtype)
        if self.grammar is not None:
            try:
                self.grammar.mask(logits)
            except ServingError as error:
                self.fault = str(error)

    def draw(self) -> float:
        """Return the next of its random numbers, in [0, 1)."""
        return self._random.random()

    def take(self, output: TokenOutput) -> None:
        """Note the token that was chosen."""
        self.outputs.append(output)
        if self._has_penalties:
            self._counts[output.token_id] += 1
        if self.grammar is not None:
            self.grammar.advance(output.token_id)

    @property
    def _has_penalties(self) -> bool:
        return self.params.presence_penalty != 0 or self.params.frequency_penalty != 0


def choose(samplers: Sequence[RequestSampler], logits: Tensor) -> list[int]:
    """Take a token for each request, note it with its logprobs, and return them.

    The device is waited for once for all tokens that are drawn, not once for each.
    logits: fp32 [N, V], left as they are.
    """
    scores = logits
    changing = [i for i, sampler in enumerate(samplers) if sampler.changes_logits]
    if changing:
        scores = logits.clone()
        for i in changing:
            samplers[i].change(scores[i])
    likeliest = scores.argmax(-1)
    drawn = {
        i: _draw(sampler, scores[i]) for i, sampler in enumerate(samplers) if not sampler.is_greedy
    }
    tokens: list[int] = likeliest.tolist()
    if drawn:
        for i, token in zip(drawn, torch.cat(list(drawn.values())).tolist(), strict=True):
            tokens[i] = token
    told = _logprobs(samplers, logits, tokens)
    for i, (sampler, token) in enumerate(zip(samplers, tokens, strict=True)):
        sampler.take(told.get(i) or TokenOutput(token))
    return tokens


def _draw(sampler: RequestSampler, logits: Tensor) -> Tensor:
    """Draw a token [1] from one row [V]: temperature, then the cut to top_k, then to top_p."""
    params = sampler.params
    # In float64, and less the largest: no temperature makes it overflow.
    scaled = (logits.double() - logits.max()) / params.temperature
    tokens = None
    if params.top_k:
        scaled, tokens = scaled.topk(min(params.top_k, scaled.shape[0]))
    elif params.top_p < 1:
        scaled, tokens = scaled.sort(descending=True, stable=True)
    shares = scaled.softmax(-1)
    sums = shares.cumsum(-1)
    total, last = sums[-1:], None
    if params.top_p < 1:
        # the tokens before which less than top_p is reached: always the first
        num_kept = (sums - shares < params.top_p).sum().view(1)
        last = (num_kept - 1).clamp(min=0)
        total = sums.gather(0, last)
    place = torch.searchsorted(sums, sampler.draw() * total, right=True)
    place = place.clamp(max=sums.shape[0] - 1 if last is None else last)
    return place if tokens is None else tokens.gather(0, place)


def _logprobs(
    samplers: Sequence[RequestSampler], logits: Tensor, tokens: Sequence[int]
) -> dict[int, TokenOutput]:
    """Return the outputs of the rows that are to tell raw log probabilities, by row."""
    told = {
        i: sampler.params.logprobs
        for i, sampler in enumerate(samplers)
        if sampler.params.logprobs is not None
    }
    if not told:
        return {}
    rows = logits if len(told) == len(samplers) else torch.stack([logits[i] for i in told])
    rows = rows.log_softmax(-1)
    chosen = torch.tensor([[tokens[i]] for i in told], device=logits.device)
    own: list[float] = rows.gather(1, chosen)[:, 0].tolist()
    tops: dict[int, TopLogprobs] = {}
    for num_top in set(told.values()) - {0}:
        alike = [(place, i) for place, i in enumerate(told) if told[i] == num_top]
        # each row by itself: how many others there are would decide between equal ones
        best = [rows[place].topk(min(num_top, rows.shape[1])) for place, _ in alike]
        values = torch.stack([it.values for it in best]).tolist()
        ids = torch.stack([it.indices for it in best]).tolist()
        found = zip(alike, ids, values, strict=True)
        tops |= {i: tuple(zip(row, scores, strict=True)) for (_, i), row, scores in found}
    return {
        i: TokenOutput(tokens[i], value, tops.get(i, ()))
        for i, value in zip(told, own, strict=True)
    }
