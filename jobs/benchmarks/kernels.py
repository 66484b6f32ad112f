"""The kernels that a training step of a Llama runs on, the same for every contender.

"plain" is the model as transformers has it. "liger" takes Liger's kernels for norms, rotary
embedding, activation and loss, whose logits never exist as a whole. "compiled" compiles each
decoder layer with torch.compile, which fuses norms, rotary embedding and activation by itself.
"""

from typing import Literal

import torch
from transformers import PreTrainedModel

Kernels = Literal["plain", "liger", "compiled"]


def use_kernels(model: PreTrainedModel, kernels: Kernels) -> None:
    """Let `model` run on them, whatever has been attached to its layers.

    Liger's rotary embedding takes the place of every Llama's in this process. Raises SystemExit
    where liger-kernel is not installed.
    """
    if kernels == "liger":
        try:
            from liger_kernel.transformers import apply_liger_kernel_to_llama
        except ImportError:
            raise SystemExit("--kernels liger: pip install liger-kernel; it takes a GPU") from None
        apply_liger_kernel_to_llama(model=model)
    elif kernels == "compiled":
        # One entry of the cache for each contender and mode; past the limit layers run plainly.
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.accumulated_recompile_limit = 1024
        for layer in model.model.layers:
            layer.compile()
