"""The seam to transformers' continuous batching: what it is asked to do, and where we step in.

The batching pages the KV cache and forms the batches. Before each forward pass a hook tells the
layers which tokens are whose; after it a processor samples for every request by its own rules and
leaves the batching, which is greedy, no choice. Pages are shared as `shared_prefixes` has it: the
batching's own cache doesn't know adapters, and answered requests of one with another's.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

from s2ft_ray.serving.shared_prefixes import OwnerOf, SharedPrefixes

Choose = Callable[[list[str], Tensor], list[int]]
"""(request ids, logits [N, V]) -> the token of each."""


class _Sampling(ContinuousBatchingLogitsProcessor):  # type: ignore[misc]
    """Lets `choose` take each row's token, and makes it the only one that greedy can take."""

    supported_kwargs: ClassVar[dict[str, type]] = {}
    ignored_kwargs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, choose: Choose, end_step: Callable[[], None]) -> None:
        self._choose = choose
        self._end_step = end_step
        self._request_ids: list[str] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """Our arguments are not numbers, so there is nothing to fill in."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: Sequence[Any]) -> Tensor:
        """Note whose rows the next scores are."""
        self._request_ids = [request.state.request_id for request in requests_with_new_token]
        return torch.zeros(len(self._request_ids), dtype=torch.int32)

    def __call__(self, scores: Tensor, _tensor_arg: Tensor) -> Tensor:
        """Take a token for each row. scores: [N, V]."""
        rows = scores[: len(self._request_ids)]
        tokens = torch.tensor(self._choose(self._request_ids, rows), device=scores.device)
        rows.scatter_(1, tokens[:, None], torch.inf)
        if scores.is_cuda:  # the layers' kernels too are through with the adapters' rows
            torch.cuda.current_stream(scores.device).synchronize()
        self._end_step()
        return scores


class Batching:
    """One model's batching loop, in a thread of its own."""

    def __init__(
        self,
        model: PreTrainedModel,
        choose: Choose,
        route: Callable[[list[tuple[str, int]]], None],
        owner_of: OwnerOf | None,
        *,
        cache_tokens: int,
        max_batch_tokens: int,
        max_batch_requests: int,
        page_size: int,
    ) -> None:
        """Prepare the loop. `route` gets (request id, tokens) of each request of a batch.

        `owner_of` tells whose pages of the cache a request may share; None: no pages are shared.
        """
        self._model = model
        self._route = route
        self._owner_of = owner_of
        self._prefixes: SharedPrefixes | None = None
        config = ContinuousBatchingConfig(
            page_size=page_size,
            num_blocks=-(-cache_tokens // page_size),
            max_batch_tokens=max_batch_tokens,
            max_requests_per_batch=max_batch_requests,
            max_blocks_per_request=0,
            allow_block_sharing=owner_of is not None,
            use_async_batching=False,
            use_cuda_graph=False,
            auto_switch_to_flash=model.dtype != torch.float32,  # its kernels take half precision
        )
        greedy = GenerationConfig(do_sample=False, eos_token_id=-1)
        self._manager: ContinuousBatchingManager = model.init_continuous_batching(greedy, config)
        processor = _Sampling(choose, self._end_step)
        sampling = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([processor]))
        sampling.tensors_required = 1
        self._manager.logit_processor = sampling
        self._hook = model.register_forward_pre_hook(self._before_forward)
        self.num_steps = 0
        """Steps that have begun."""
        self._num_ended = 0
        self.last_step_at = time.monotonic()

    @property
    def num_shared_tokens(self) -> int:
        """Prompt tokens that were found in the cache."""
        return 0 if self._prefixes is None else self._prefixes.num_tokens

    def start(self) -> None:
        """Start the loop."""
        self._manager.start()

    def stop(self, timeout_s: float) -> None:
        """End the loop: what it runs is finished within `timeout_s`, else failed."""
        thread = self._manager._generation_thread
        if thread is not None:
            # Not by the manager's own stop: once its time is over that takes the batches away from
            # a loop that still runs, which then dies of it.
            status = self._manager.background_thread_status
            status.request_stop(status.FLUSH_AND_STOP, 0)
            self._manager._wake_up_loop.set()
            thread.join(timeout_s)
            self._manager.stop(block=True, timeout=timeout_s, hard_stop=thread.is_alive())
        self._hook.remove()

    def add(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        max_tokens: int,
        eos_token_ids: list[int],
        on_output: Callable[[Any], None],
    ) -> bool:
        """Queue a request; `on_output` is called in this event loop with each GenerationOutput.

        False where the loop takes no more.
        """
        self._manager.register_result_handler(request_id, on_output)
        added = self._manager.add_request(
            list(prompt_ids),
            request_id=request_id,
            max_new_tokens=max_tokens,
            streaming=True,
            eos_token_id=eos_token_ids or -1,
        )
        if added is None:
            self._forget(request_id)
        return added is not None

    def cancel(self, request_id: str) -> None:
        """End a request; its pages are free before the next step."""
        self._forget(request_id)
        self._manager.cancel_request(request_id)

    def is_past(self, step: int) -> bool:
        """Tell whether the step of that number, and with it what it was routed to, is over."""
        return self._num_ended >= step or self._death() is not None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Give a context in which no step runs and the caller may use the model plainly."""
        with self._manager.pause():
            plain = self._manager._original_attn_impl
            if plain is None:
                yield
                return
            paged = self._model.config._attn_implementation
            self._model.set_attn_implementation(plain)  # the paged one refuses a plain forward
            try:
                yield
            finally:
                self._model.set_attn_implementation(paged)

    def fault(self) -> str | None:
        """Return why the loop takes no requests: it is dead, or told to stop. None else."""
        # It tells its requests of its error before it notes it: between the two it is "stopping".
        refusal: str | None = self._manager.background_thread_status.can_accept_new_requests()
        return self._death() or refusal

    def _death(self) -> str | None:
        error = self._manager.background_thread_status.fatal_error
        if error is not None:
            return f"{type(error).__name__}: {error}"
        return None if self._manager.is_running() else "its thread has ended"

    def _forget(self, request_id: str) -> None:
        router = self._manager.output_router
        with router._lock:
            router.result_handlers.pop(request_id, None)

    def _before_forward(self, *_: Any) -> None:
        """Tell whose tokens come, where it is the loop that calls."""
        processor = self._manager.batch_processor
        in_loop = self._manager._generation_thread is threading.current_thread()
        if processor is None or not in_loop:
            return
        if self._prefixes is None and self._owner_of is not None:  # no page is filled before this
            self._prefixes = SharedPrefixes(processor.cache, self._owner_of)
        batch = processor.inputs_and_outputs.requests_in_batch
        self.num_steps += 1  # before it is asked who runs: see Engine._leave
        self._route([(request.state.request_id, request.query_length) for request in batch])
        self.last_step_at = time.monotonic()

    def _end_step(self) -> None:
        self._num_ended = self.num_steps
