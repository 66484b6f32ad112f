"""The engine: one base, many adapters, one batch.

    generate -> residency (the adapter's place on the device) -> batching (steps)
             -> routing, batched layers (the adapters' part) -> sampling -> tokens

Invariant: a request is answered by the adapter that it names or by nobody. All methods belong to
one event loop; the steps run in a thread of their own.
"""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Coroutine,
    Hashable,
    Iterator,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from s2ft_ray.errors import ConfigError, ServingError
from s2ft_ray.method import Adapter
from s2ft_ray.method.switching import base_fingerprint
from s2ft_ray.serving.adapter_store import AdapterStore
from s2ft_ray.serving.batched_layers import BatchedLayers, hidden_size_of
from s2ft_ray.serving.batching import Batching
from s2ft_ray.serving.device_slots import DeviceSlots, Slot
from s2ft_ray.serving.engine_stats import AdapterEvents, EngineStats, Resident, Tier
from s2ft_ray.serving.grammar import Grammars
from s2ft_ray.serving.passage import Passage
from s2ft_ray.serving.requests import (
    AdapterKey,
    GenerationRequest,
    PromptLogprob,
    TokenOutput,
    TopLogprobs,
)
from s2ft_ray.serving.residency import Residency
from s2ft_ray.serving.routing import Routing
from s2ft_ray.serving.sampling import RequestSampler, choose

_SCORE_CHUNK = 512
_Result = TypeVar("_Result")


@dataclass(eq=False, slots=True)
class _Running:
    """A request in the batching loop."""

    sampler: RequestSampler
    slot: Slot | None
    owner: tuple[str | None, AdapterKey | None, bool]
    """Whose pages of the cache it shares: its tenant's, its adapter's, mixed or dedicated."""


class Engine:
    """Generates for any mix of adapters of one base. Call `start` before the first request."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        load: Callable[[AdapterKey], Adapter],
        *,
        slot_bytes: int = 256 * 2**20,
        host_bytes: int = 2**30,
        cache_tokens: int = 16_384,
        max_batch_tokens: int = 512,
        max_batch_requests: int = 64,
        page_size: int = 32,
        share_prefixes: bool = True,
        stuck_after_s: float = 60.0,
    ) -> None:
        """Take a plain base over. `load` fetches an adapter by its key, in a thread.

        Bytes are of the device (`slot_bytes`) and of host memory. A request's prompt and output
        together must fit `cache_tokens`, which all requests share; with `share_prefixes` one that
        begins like another of its tenant and adapter computes only the rest.
        """
        self._model = model.eval().requires_grad_(False)
        self._eos_token_ids = _eos_token_ids(model, tokenizer)
        self._grammars = Grammars(tokenizer, model.config.get_text_config().vocab_size)
        self.events = AdapterEvents()
        self._slots = DeviceSlots(
            hidden_size_of(model), model.dtype, model.device, slot_bytes, self.events
        )
        self.base_fingerprint = base_fingerprint(model)
        self._store = AdapterStore(load, self.base_fingerprint, host_bytes, self.events)
        self._layers = BatchedLayers(model, self._slots)
        self._residency = Residency(self._slots, self._store, self._layers.prepare, self.events)
        self._batching = Batching(
            model,
            self._choose,
            self._route,
            self._owner_of if share_prefixes else None,
            cache_tokens=cache_tokens,
            max_batch_tokens=max_batch_tokens,
            max_batch_requests=max_batch_requests,
            page_size=page_size,
        )
        positions = int(model.config.get_text_config().max_position_embeddings)
        self.max_tokens = min(positions, cache_tokens)
        """The most tokens that a prompt and its output may have together."""
        self._using_model = threading.Lock()
        # prompts are scored one at a time: in one thread, so that they fill no pool of others
        self._scorer = ThreadPoolExecutor(1, thread_name_prefix="score")
        self._passage = Passage()
        self._dedicated: tuple[AdapterKey, Adapter] | None = None
        self._running: dict[str, _Running] = {}
        self._composition: list[tuple[Slot | None, int]] = []
        self._stuck_after_s = stuck_after_s
        self._busy_since: float | None = None
        self._is_stopped = False

    def start(self) -> None:
        """Start the batching loop."""
        self._batching.start()

    def stop(self, timeout_s: float = 30.0) -> None:
        """Finish what runs within `timeout_s`, fail the rest, and leave the model plain."""
        self._batching.stop(timeout_s)
        # what is being scored needs the layers as they are; what waits for it is told
        self._scorer.shutdown(cancel_futures=True)
        self._store.close()
        self._is_stopped = True
        self._layers.remove()
        if self._dedicated is not None:
            self._dedicated[1].switch_out(self._model)
            self._dedicated = None

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenOutput]:
        """Yield the request's tokens as they are generated; the last has a finish_reason.

        Leaving the iteration early cancels the request. Raises ConfigError for a request that
        can't be served as it is, AdapterError for its adapter, ServingError where the engine fails.
        """
        params = request.params
        if params.max_tokens == 0:
            raise ConfigError("max_tokens: 0 generates nothing; score() tells of the prompt")
        self._check_length(request.prompt_ids, params.max_tokens)
        if request.request_id in self._running:
            raise ConfigError(f"request {request.request_id}: one of that id runs already")
        grammar = None
        if params.json_schema is not None:
            grammar = await asyncio.to_thread(self._grammars.compile, params.json_schema)
        async with self._in_use(request.adapter, request.tenant) as slot:
            sampler = RequestSampler(params, grammar)
            # closed with this one, not when it is collected: a client that left is cancelled now
            owner = (request.tenant, request.adapter, slot is None)
            async with aclosing(self._run(request, _Running(sampler, slot, owner))) as outputs:
                async for output in outputs:
                    yield output

    async def score(
        self,
        prompt_ids: Sequence[int],
        adapter: AdapterKey | None = None,
        top_logprobs: int = 0,
        tenant: str | None = None,
    ) -> list[PromptLogprob]:
        """Return the log probability of each prompt token given those before it.

        Runs between two steps of the batching. Raises as `generate` does.
        """
        self._check_length(prompt_ids, 0)
        if self._is_stopped:
            raise ServingError("the engine is stopped")

        async def score() -> list[PromptLogprob]:
            async with self._in_use(adapter, tenant) as slot:
                return await asyncio.get_running_loop().run_in_executor(
                    self._scorer, self._score, list(prompt_ids), slot, top_logprobs
                )

        return await _to_its_end(score())

    async def fetch(self, key: AdapterKey) -> Adapter:
        """Return an adapter, which is in host memory from then on. Raises as `generate` does."""
        return await self._store.get(key)

    async def prewarm(self, key: AdapterKey, tenant: str | None = None) -> None:
        """Bring an adapter to the device. Raises as `generate` does."""
        self._residency.release(await self._residency.acquire(key, tenant))

    async def pin(self, key: AdapterKey) -> None:
        """Bring an adapter to the device and keep it there until `unpin`."""
        slot = await self._residency.acquire(key)
        slot.is_pinned = True
        self._residency.release(slot)

    def unpin(self, key: AdapterKey) -> None:
        """Let an adapter be evicted again."""
        if slot := self._slots.find(key):
            slot.is_pinned = False

    async def dedicate(self, key: AdapterKey) -> None:
        """Switch one adapter into the base weights: its requests then cost what the base's do.

        Waits for a moment without requests; new ones wait with it. Until `end_dedication` those
        for anything else, the base too, are refused with a ServingError. Raises as `generate` does.
        """
        adapter = await self._store.get(key)

        async def switch() -> None:
            async with self._passage.alone():
                if self._dedicated is not None:
                    raise ServingError(
                        f"{key}: the engine is dedicated to {self._dedicated[0]}; end that first"
                    )
                await asyncio.to_thread(self._switch, adapter.switch_into)
                self._dedicated = (key, adapter)

        await _to_its_end(switch())

    async def end_dedication(self) -> None:
        """Put the base back, bitwise, at a moment without requests; serve everything again."""

        async def switch() -> None:
            async with self._passage.alone():
                if self._dedicated is not None:
                    await asyncio.to_thread(self._switch, self._dedicated[1].switch_out)
                    self._dedicated = None

        await _to_its_end(switch())

    @property
    def dedicated(self) -> AdapterKey | None:
        """The adapter that is in the base's weights."""
        return None if self._dedicated is None else self._dedicated[0]

    def drop(self, key: AdapterKey) -> None:
        """Forget an adapter; its running requests end on it."""
        self._residency.drop(key)

    def check_health(self) -> None:
        """Raise ServingError where the loop is dead, or has requests and makes no step."""
        if fault := self._batching.fault():
            raise ServingError(f"the engine's loop is dead: {fault}")
        if self._busy_since is not None:
            quiet_s = time.monotonic() - max(self._busy_since, self._batching.last_step_at)
            if quiet_s > self._stuck_after_s:
                raise ServingError(
                    f"the engine has made no step for {quiet_s:.0f} s with"
                    f" {len(self._running)} requests running"
                )

    def stats(self) -> EngineStats:
        """Return what the engine holds now."""
        return EngineStats(
            num_running=len(self._running),
            num_waiting_adapters=self._residency.num_waiting,
            device_bytes=self._slots.size_bytes,
            device_used_bytes=self._slots.used_bytes,
            host_used_bytes=self._store.used_bytes,
            num_loads=self.events.totals["load"],
            num_hits=self.events.totals["hit"],
            num_misses=self.events.totals["miss"],
            num_evictions=self.events.totals["eviction"],
            num_steps=self._batching.num_steps,
            num_shared_tokens=self._batching.num_shared_tokens,
            on_device=tuple(slot.key for slot in self._slots),
        )

    def memory(self) -> dict[tuple[AdapterKey, Tier], int]:
        """Return the bytes of each adapter at each place that it has."""
        taken: dict[tuple[AdapterKey, Tier], int] = {
            (slot.key, "device"): self._slots.slot_bytes(slot) for slot in self._slots
        }
        return taken | {(key, "host"): size for key, size in self._store.sizes().items()}

    def residents(self) -> list[Resident]:
        """Return the adapters in memory, each at its fastest place."""
        residents = [
            Resident(slot.key, "device", self._slots.slot_bytes(slot), slot.num_users)
            for slot in self._slots
        ]
        on_device = {resident.key for resident in residents}
        # a dedicated one has no slot that counts its users
        running = Counter(it.owner[1] for it in self._running.values())
        return residents + [
            Resident(key, "host", size, running[key])
            for key, size in self._store.sizes().items()
            if key not in on_device
        ]

    # One request

    def _check_length(self, prompt_ids: Sequence[int], max_tokens: int) -> None:
        if not prompt_ids:
            raise ConfigError("prompt: is empty; send at least one token")
        if max_tokens < 0:
            raise ConfigError(f"max_tokens: {max_tokens} is below 0")
        if len(prompt_ids) + max_tokens > self.max_tokens:
            raise ConfigError(
                f"prompt: {len(prompt_ids)} tokens and max_tokens {max_tokens} together pass the"
                f" {self.max_tokens} that this model has room for"
            )

    @asynccontextmanager
    async def _in_use(
        self, adapter: AdapterKey | None, tenant: str | None
    ) -> AsyncIterator[Slot | None]:
        async with self._passage.inside():
            if adapter is None or self._dedicated is not None:
                self._check_dedication(adapter)
                yield None
                return
            slot = await self._residency.acquire(adapter, tenant)
            try:
                yield slot
            finally:
                self._leave(slot, self._batching.num_steps)

    def _leave(self, slot: Slot, step: int) -> None:
        """Give a slot back once `step`, the last that may have been routed to it, is over.

        A request that goes away amid a step leaves its rows to that step: filled with another
        adapter, they would hold places that the step's layers don't have.
        """
        if self._batching.is_past(step):
            self._residency.release(slot)
        else:
            asyncio.get_running_loop().call_later(0.001, self._leave, slot, step)

    def _check_dedication(self, adapter: AdapterKey | None) -> None:
        if self._dedicated is not None and self._dedicated[0] != adapter:
            raise ServingError(
                f"{adapter or 'the base'}: this engine is dedicated to {self._dedicated[0]}"
            )

    def _switch(self, change: Callable[[nn.Module], None]) -> None:
        with self._alone():
            change(self._model)

    async def _run(
        self, request: GenerationRequest, running: _Running
    ) -> AsyncGenerator[TokenOutput]:
        arrivals: asyncio.Queue[Any] = asyncio.Queue()
        if not self._running:
            self._busy_since = time.monotonic()
        self._running[request.request_id] = running
        finished = False
        try:
            eos = [] if request.params.ignore_eos else self._eos_token_ids
            added = self._batching.add(
                request.request_id,
                request.prompt_ids,
                request.params.max_tokens,
                eos,
                arrivals.put_nowait,
            )
            if not added:
                raise ServingError(f"the engine takes no requests: {self._batching.fault()}")
            num_sent = 0
            while not finished:
                arrival = await arrivals.get()
                finished = arrival.is_finished()
                fault = arrival.error or running.sampler.fault
                if fault is not None:
                    raise ServingError(f"request {request.request_id}: {fault}")
                num_tokens = len(arrival.generated_tokens)
                for i in range(num_sent, num_tokens):
                    output = running.sampler.outputs[i]
                    if finished and i == num_tokens - 1:
                        ends = output.token_id in eos
                        output = replace(output, finish_reason="stop" if ends else "length")
                    yield output
                num_sent = num_tokens
        finally:
            del self._running[request.request_id]
            if not self._running:
                self._busy_since = None
            if not finished:
                self._batching.cancel(request.request_id)

    # In the loop's thread

    def _owner_of(self, request_id: str) -> Hashable | None:
        running = self._running.get(request_id)
        return None if running is None else running.owner

    def _route(self, batch: list[tuple[str, int]]) -> None:
        """Tell the layers whose tokens come: (request id, tokens) in the batch's order."""
        composition = []
        for request_id, num_tokens in batch:
            running = self._running.get(request_id)  # None: cancelled meanwhile
            composition.append((running.slot if running else None, num_tokens))
        if composition == self._composition:
            return
        ranges, at = [], 0
        for slot, num_tokens in composition:
            if slot is not None:
                ranges.append((slot, at, at + num_tokens))
            at += num_tokens
        self._layers.routing = Routing(ranges, self._slots) if ranges else None
        self._composition = composition

    def _choose(self, request_ids: list[str], logits: Tensor) -> list[int]:
        """Sample for each request; one that was cancelled meanwhile gets any token."""
        running = [self._running.get(request_id) for request_id in request_ids]
        live = [i for i, it in enumerate(running) if it is not None]
        tokens = [0] * len(request_ids)
        if live:
            samplers = [it.sampler for it in running if it is not None]
            rows = logits if len(live) == len(request_ids) else logits[live]
            for i, token in zip(live, choose(samplers, rows), strict=True):
                tokens[i] = token
        return tokens

    @torch.no_grad()
    def _score(
        self, prompt_ids: list[int], slot: Slot | None, top_logprobs: int
    ) -> list[PromptLogprob]:
        ids = torch.tensor([prompt_ids], device=self._model.device)
        scored = [PromptLogprob(prompt_ids[0], None)]
        cache = DynamicCache(config=self._model.config)
        for start in range(0, ids.shape[1] - 1, _SCORE_CHUNK):
            stop = min(start + _SCORE_CHUNK, ids.shape[1] - 1)
            routing = None if slot is None else Routing([(slot, 0, stop - start)], self._slots)
            with self._alone(), self._layers.follow(routing):
                logits = self._model(ids[:, start:stop], past_key_values=cache).logits[0]
            targets = ids[0, start + 1 : stop + 1]
            scored += _tell(logits.float().log_softmax(-1), targets, top_logprobs)
        return scored

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Have the model for oneself: no step, and nobody else outside the steps."""
        with self._batching.paused(), self._using_model:
            try:
                yield
            finally:
                if self._model.device.type == "cuda":  # the steps read on a stream of their own
                    torch.cuda.current_stream(self._model.device).synchronize()
            self._batching.last_step_at = time.monotonic()


async def _to_its_end(work: Coroutine[Any, Any, _Result]) -> _Result:
    """Await work that goes on, with all that it holds, where who waits for it leaves."""
    task = asyncio.create_task(work)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    return await asyncio.shield(task)


def _tell(logprobs: Tensor, targets: Tensor, num_top: int) -> list[PromptLogprob]:
    """Read the targets' log probabilities. logprobs: [T, V], targets: [T]."""
    own = logprobs.gather(1, targets[:, None])[:, 0].tolist()
    tops: list[TopLogprobs] = [()] * len(own)
    if num_top:
        values, tokens = logprobs.topk(num_top)
        pairs = zip(tokens.tolist(), values.tolist(), strict=True)
        tops = [tuple(zip(row, scores, strict=True)) for row, scores in pairs]
    rows = zip(targets.tolist(), own, tops, strict=True)
    return [PromptLogprob(token, value, top) for token, value, top in rows]


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end a text, by the model's generation config and its tokenizer."""
    config = model.generation_config
    named: Any = None if config is None else config.eos_token_id
    found = {named} if isinstance(named, int) else set(named or ())
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    return sorted(found)
