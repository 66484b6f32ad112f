"""Whether an adapter does what it did in training: its logits against the merged model's.

Invariant: the base that serves is never touched. The merged model shares the base's weights; a
module that the adapter changes has a copy of its own while it runs, so that a check takes one
module's memory, not the model's.
"""

import copy
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from s2ft_ray.errors import AdapterError, ServingError
from s2ft_ray.method import Adapter
from s2ft_ray.method.parts import AdapterSlice
from s2ft_ray.method.switching import bind
from s2ft_ray.method.weights import Weight, gather, put, stored_dim
from s2ft_ray.serving.requests import PromptLogprob

NUM_TOKENS = 12
_TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 0.35, torch.float16: 0.1}
"""On a logprob. fp32: rounding of another order of sums; below it: of 8 and 11 bits."""


class Canary:
    """A prompt, and a second skeleton over the base's weights, into which one adapter at a time is
    switched."""

    def __init__(self, model: PreTrainedModel) -> None:
        """To be made before anyone hooks into `model`: the skeleton would copy the hooks."""
        vocab_size = int(model.config.get_text_config().vocab_size)
        self.prompt_ids = tuple((37 + 9973 * place) % vocab_size for place in range(NUM_TOKENS))
        """Spread over the vocabulary, the same for every adapter."""
        self._tolerance = _TOLERANCE.get(model.dtype, 0.35)
        tensors = [*model.parameters(), *model.buffers()]
        shared: dict[int, object] = {id(tensor): tensor for tensor in tensors}
        self._model = copy.deepcopy(model, shared).eval()

    @torch.inference_mode()
    def logprobs(self, adapter: Adapter) -> list[float]:
        """Return the log probability of each prompt token but the first, by the merged model.

        Raises AdapterError for an adapter of another base, ServingError without memory for it.
        """
        by_module: dict[nn.Module, list[tuple[Weight, AdapterSlice]]] = {}
        for name, weight in bind(self._model, adapter).items():
            by_module.setdefault(weight.module, []).append((weight, adapter.slices[name]))
        switches = [_Switch(parts) for parts in by_module.values()]
        try:
            told = self._score()
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise ServingError(
                "no memory for its check beside what is served; give the base less"
                " adapter_slot_bytes or cache_tokens"
            ) from error
        finally:
            for switch in switches:
                switch.remove()
        if not all(switch.has_run for switch in switches):  # its weights are used in another way
            raise AdapterError("canary: the base doesn't run some of the modules that it changes")
        return told

    def compare(self, served: Sequence[PromptLogprob], merged: Sequence[float]) -> None:
        """Raise AdapterError where the served logprobs aren't the merged model's."""
        for place, (token, wanted) in enumerate(zip(served[1:], merged, strict=True), start=1):
            got = token.logprob
            if got is None or not abs(got - wanted) <= self._tolerance:
                raise AdapterError(
                    f"canary: token {place} has logprob {got} when served and {wanted:.4f} in the"
                    f" merged model, more than {self._tolerance} apart"
                )

    def _score(self) -> list[float]:
        device = next(self._model.parameters()).device
        ids = torch.tensor([self.prompt_ids], device=device)
        logits = self._model(input_ids=ids, use_cache=False).logits[0, :-1]
        chosen = torch.log_softmax(logits.float(), dim=-1).gather(1, ids[0, 1:, None])
        return [float(value) for value in chosen[:, 0]]


class _Switch:
    """Gives a module merged weights while it runs."""

    def __init__(self, parts: Sequence[tuple[Weight, AdapterSlice]]) -> None:
        module = parts[0][0].module
        self.has_run = False
        self._module = module
        self._parts = parts
        self._shared = {weight.parameter_name: weight.parameter for weight, _ in parts}
        self._hooks = (
            module.register_forward_pre_hook(self._switch_in),
            module.register_forward_hook(self._switch_out, always_call=True),
        )

    def remove(self) -> None:
        """Leave the module as it was."""
        for hook in self._hooks:
            hook.remove()
        self._switch_out()

    def _switch_in(self, *_: object) -> None:
        self.has_run = True
        for weight, part in self._parts:
            setattr(self._module, weight.parameter_name, _merge(weight, part))

    def _switch_out(self, *_: object) -> None:
        for name, parameter in self._shared.items():
            setattr(self._module, name, parameter)


def _merge(weight: Weight, part: AdapterSlice) -> nn.Parameter:
    stored = weight.parameter.detach().clone()
    dim = stored_dim(part.side, weight.is_transposed)
    indices = part.indices.to(stored.device, torch.int64)
    delta = (part.delta.mT if weight.is_transposed else part.delta).to(stored.device)
    put(stored, dim, indices, (gather(stored, dim, indices).float() + delta).to(stored.dtype))
    return nn.Parameter(stored, requires_grad=False)
