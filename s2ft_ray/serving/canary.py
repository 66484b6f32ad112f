"""Whether an adapter does what it did in training: its logits against the merged model's.

Invariant: the base that serves is never touched. The merged model shares the base's weights but
for the modules that the adapter changes, which it has copies of while the check lasts.
"""

import copy
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from s2ft_ray.errors import AdapterError
from s2ft_ray.method import Adapter
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
        """Return the log probability of each prompt token but the first, by the merged model."""
        shared = self._unshare(adapter)
        try:
            adapter.switch_into(self._model)
            try:
                return self._score()
            finally:
                adapter.switch_out(self._model)
        finally:
            for module, name, parameter in shared:
                setattr(module, name, parameter)

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

    def _unshare(self, adapter: Adapter) -> list[tuple[nn.Module, str, nn.Parameter]]:
        shared = []
        for path in adapter.slices:
            try:
                owner: nn.Module = self._model.get_submodule(path)
                name = "weight"
            except AttributeError:  # experts are parameters of their module
                parent, _, name = path.rpartition(".")
                owner = self._model.get_submodule(parent)
            parameter = getattr(owner, name)
            shared.append((owner, name, parameter))
            copied = nn.Parameter(parameter.detach().clone(), requires_grad=False)
            setattr(owner, name, copied)
        return shared
