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

    logits: fp32 [N, V], left as they are.
    """
    told = _logprobs(samplers, logits)
    scores = logits
    changing = [i for i, sampler in enumerate(samplers) if sampler.changes_logits]
    if changing:
        scores = logits.clone()
        for i in changing:
            samplers[i].change(scores[i])
    tokens = scores.argmax(-1).tolist()
    for i, sampler in enumerate(samplers):
        if not sampler.is_greedy:
            tokens[i] = _draw(sampler, scores[i])
    for i, (sampler, token) in enumerate(zip(samplers, tokens, strict=True)):
        if i in told:
            row, top = told[i]
            sampler.take(TokenOutput(token, row[token].item(), top))
        else:
            sampler.take(TokenOutput(token))
    return tokens


def _draw(sampler: RequestSampler, logits: Tensor) -> int:
    """Draw a token from one row [V]: temperature, then the cut to top_k, then to top_p."""
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
    if params.top_p < 1:
        # the tokens before which less than top_p is reached: always the first
        num_kept = int((sums - shares < params.top_p).sum())
        sums = sums[: max(1, num_kept)]
    place = int(torch.searchsorted(sums, sampler.draw() * sums[-1], right=True))
    place = min(place, sums.shape[0] - 1)
    return place if tokens is None else int(tokens[place])


def _logprobs(
    samplers: Sequence[RequestSampler], logits: Tensor
) -> dict[int, tuple[Tensor, TopLogprobs]]:
    """Return the raw log probabilities [V] and the likeliest of each row that is to tell them."""
    told: dict[int, tuple[Tensor, TopLogprobs]] = {}
    for i, sampler in enumerate(samplers):
        num_top = sampler.params.logprobs
        if num_top is None:
            continue
        row = logits[i].log_softmax(-1)
        top: TopLogprobs = ()
        if num_top:
            values, tokens = row.topk(min(num_top, row.shape[0]))
            top = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
        told[i] = (row, top)
    return told
