"""From a request to its answers, on one engine: prompts in, OpenAI's bodies out.

Invariant: whatever ends a request (its last token, a stop text, an error, a client that left), the
engine is told to drop what isn't finished.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from s2ft_ray.serving.answers import Answer, Piece, TokenLogprob
from s2ft_ray.serving.bodies import (
    DONE,
    Bodies,
    ChatBodies,
    CompletionBodies,
    Usage,
    event,
    usage_chunk,
    whole,
)
from s2ft_ray.serving.detokenizer import Detokenizer, TokenTexts, decode
from s2ft_ray.serving.prompts import Limits, Render, answer_tokens, encode_chat, encode_prompts
from s2ft_ray.serving.requests import (
    AdapterKey,
    FinishReason,
    GenerationRequest,
    PromptLogprob,
    SamplingParams,
    TokenOutput,
)
from s2ft_ray.serving.routes import ServedRequest
from s2ft_ray.serving.schemas import ChatRequest, CompletionRequest

_ENCODES_AT_ONCE = 4
_COMPLETION_TOKENS = 16  # OpenAI's default for a completion; a chat ends where it ends


class Generates(Protocol):
    """What is asked of the engine here."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenOutput]:
        """Yield the tokens of one answer; closing it early drops the request."""

    async def score(
        self,
        prompt_ids: Sequence[int],
        adapter: AdapterKey | None = None,
        top_logprobs: int = 0,
        tenant: str | None = None,
    ) -> Sequence[PromptLogprob]:
        """Return what the model says of each token of a prompt."""


class Meter(Protocol):
    """Who is told what a request took."""

    def first_token(self, request: ServedRequest, seconds: float) -> None:
        """Count the time from a request's arrival to its first token."""

    def next_token(self, request: ServedRequest, seconds: float) -> None:
        """Count the time between two tokens of one answer."""

    def tokens(self, request: ServedRequest, usage: Usage) -> None:
        """Count a request's tokens once it is over, however it ended."""


class Generator:
    """Answers requests with one engine and its tokenizer."""

    def __init__(
        self,
        engine: Generates,
        tokenizer: PreTrainedTokenizerBase,
        limits: Limits,
        meter: Meter,
        render: Render,
    ) -> None:
        """`render` is asked for the text of a chat whose template isn't the tokenizer's."""
        self._engine = engine
        self._tokenizer = tokenizer
        self._texts = TokenTexts(tokenizer)
        self._limits = limits
        self._meter = meter
        self._render = render
        # threads of their own: prompts that take long keep nobody's adapter from the device
        self._threads = ThreadPoolExecutor(_ENCODES_AT_ONCE, thread_name_prefix="encode")
        tokenizer("x")  # its first call may set it up anew, which no other thread may see

    async def answer(self, served: ServedRequest) -> AsyncGenerator[str]:
        """Yield the body, or where the request streams, server-sent events.

        Several events are one text where they are there at once. Raises ApiError for what can't be
        answered, before the first text.
        """
        run = await self._begin(served)
        if not served.request.stream:
            yield await self._whole(served, run)
            return
        async with aclosing(self._events(served, run)) as texts:
            async for text in texts:
                yield text

    async def _whole(self, served: ServedRequest, run: "_Run") -> str:
        choices = [await run.echo(index) for index in range(len(run.answers))]
        async with aclosing(run.batches()) as batches:
            async for batch in batches:
                for index, piece in batch:
                    choices[index].add(piece)
        return whole(self._bodies(served), served.identity, choices, run.usage)

    async def _events(self, served: ServedRequest, run: "_Run") -> AsyncGenerator[str]:
        bodies = self._bodies(served)
        echoes = [await run.echo(index) for index in range(len(run.answers))]
        opening = [bodies.first(index) for index in range(len(run.answers))]
        opening += [bodies.chunk(index, echo) for index, echo in enumerate(echoes) if echo]
        text = "".join(event(chunk) for chunk in opening if chunk)
        async with aclosing(run.batches()) as batches:
            async for batch in batches:  # the opening waits: what is refused is, before an event
                yield text + "".join(event(bodies.chunk(*piece)) for piece in batch)
                text = ""
        if served.request.wants_usage:
            text += usage_chunk(bodies, served.identity, run.usage)
        yield text + DONE

    async def _begin(self, served: ServedRequest) -> "_Run":
        loop = asyncio.get_running_loop()
        prompts = await loop.run_in_executor(self._threads, self._encode, served)
        return _Run(self._engine, self._tokenizer, self._limits, self._meter, served, prompts)

    def _encode(self, served: ServedRequest) -> list[list[int]]:
        request, template = served.request, served.route.chat_template
        if isinstance(request, CompletionRequest):
            return encode_prompts(request, self._tokenizer, self._limits)
        return [encode_chat(request, self._tokenizer, template, self._limits, self._render)]

    def _bodies(self, served: ServedRequest) -> Bodies:
        request = served.request
        if isinstance(request, ChatRequest):
            return ChatBodies(served.identity, self._texts, bool(request.logprobs))
        return CompletionBodies(served.identity, self._texts, request.logprobs is not None)


class _Run:
    """The answers to one request, each a generation of its own."""

    def __init__(
        self,
        engine: Generates,
        tokenizer: PreTrainedTokenizerBase,
        limits: Limits,
        meter: Meter,
        served: ServedRequest,
        prompts: list[list[int]],
    ) -> None:
        self._engine = engine
        self._meter = meter
        self._served = served
        self._tokenizer = tokenizer
        self._prompts = prompts
        request = served.request
        if isinstance(request, ChatRequest):
            asked, default = request.token_limit, None
        else:
            asked, default = request.max_tokens, _COMPLETION_TOKENS
        most = answer_tokens(self._prompts, asked, default, limits)
        each = [prompt for prompt in self._prompts for _ in range(request.num_choices)]
        # completions tell the end token's logprob, as OpenAI's do: lm_eval counts on a token more
        # than the prompt has
        tells_end = isinstance(request, CompletionRequest)
        self.answers = [Answer(tokenizer, prompt, request.stops, tells_end) for prompt in each]
        self._requests = [
            GenerationRequest(
                request_id=f"{served.identity.id}-{index}",
                prompt_ids=tuple(prompt),
                params=_params(request, most, index % request.num_choices),
                adapter=served.route.adapter,
                tenant=served.tenant,
            )
            for index, prompt in enumerate(each)
        ]
        self._is_scoring = most == 0
        self._started = time.monotonic()
        self._is_first = True
        self._queue: asyncio.Queue[tuple[int, Piece] | BaseException | None] = asyncio.Queue()

    @property
    def usage(self) -> Usage:
        """The tokens so far."""
        return Usage(
            sum(len(prompt) for prompt in self._prompts),
            sum(answer.num_tokens for answer in self.answers),
        )

    async def echo(self, index: int) -> Piece:
        """Return the prompt as the first piece of its answer, where the request wants it."""
        request = self._served.request
        if not isinstance(request, CompletionRequest) or not request.echo:
            return Piece()
        ids = self._requests[index].prompt_ids
        finish_reason: FinishReason | None = "length" if self._is_scoring else None
        text = decode(self._tokenizer, ids)
        if request.logprobs is None:
            return Piece(text, finish_reason=finish_reason)
        adapter = self._served.route.adapter
        scored = await self._engine.score(ids, adapter, request.logprobs, self._served.tenant)
        tokens, offset, detokenizer = [], 0, Detokenizer(self._tokenizer, ())
        for token in scored:
            tokens.append(TokenLogprob(token.token_id, token.logprob, token.top_logprobs, offset))
            offset += len(detokenizer.push(token.token_id))
        self.answers[index].follow(text)
        return Piece(text, tokens, finish_reason)

    async def batches(self) -> AsyncGenerator[list[tuple[int, Piece]]]:
        """Yield (place of the answer, piece), all that are there at once, until all are whole."""
        if self._is_scoring:
            self._meter.tokens(self._served, self.usage)
            return
        tasks = [asyncio.create_task(self._generate(index)) for index in range(len(self.answers))]
        running = len(tasks)
        try:
            while running:
                items = [await self._queue.get()]
                while not self._queue.empty():
                    items.append(self._queue.get_nowait())
                for item in items:
                    if isinstance(item, BaseException):
                        raise item
                running -= items.count(None)
                batch = [item for item in items if isinstance(item, tuple)]
                if batch:
                    yield batch
        finally:
            for task in tasks:
                task.cancel()
            for task in tasks:
                with suppress(asyncio.CancelledError):
                    await task
            self._meter.tokens(self._served, self.usage)

    async def _generate(self, index: int) -> None:
        answer, request = self.answers[index], self._requests[index]
        last = None
        try:
            async with aclosing(self._engine.generate(request)) as outputs:
                async for output in outputs:
                    now = time.monotonic()
                    self._time(last, now)
                    last = now
                    piece = answer.push(output)
                    if piece:
                        self._queue.put_nowait((index, piece))
                    if answer.is_finished:
                        break
            self._queue.put_nowait(None)
        except Exception as error:  # noqa: BLE001 - handed to who waits for the pieces
            self._queue.put_nowait(error)

    def _time(self, last: float | None, now: float) -> None:
        if last is not None:
            self._meter.next_token(self._served, now - last)
        elif self._is_first:
            self._is_first = False
            self._meter.first_token(self._served, now - self._started)


def _params(
    request: CompletionRequest | ChatRequest, max_tokens: int, choice: int
) -> SamplingParams:
    if isinstance(request, ChatRequest):
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        schema = request.json_schema
    else:
        logprobs, schema = request.logprobs, None
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        top_k=request.top_k or 0,
        # n answers of one seed are n different ones, and the same ones again
        seed=None if request.seed is None else request.seed + choice,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logprobs=logprobs,
        json_schema=schema,
    )
