"""The memory estimate against what the graph really keeps."""

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from s2ft_ray.config import parse_config
from s2ft_ray.method import convert
from s2ft_ray.training.plan import estimate_memory

VOCAB, TOKENS = 64, 512


def bytes_kept(model: LlamaForCausalLM) -> int:
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    seen: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(0, VOCAB, (4, TOKENS // 4))
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = model(input_ids=ids, use_cache=False).logits.float().square().sum()
    assert loss.requires_grad
    return sum(seen.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 8])
def test_the_estimate_is_what_the_graph_keeps(
    dtype: str, checkpointing: bool, kv_heads: int
) -> None:
    torch.manual_seed(0)
    sizes = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=kv_heads,
        dtype=dtype,
    )
    config = parse_config(
        {
            "tenant": "acme",
            "name": "bot",
            "data": {"train": "rows.jsonl"},
            "model": {"dtype": dtype},
            "optim": {"micro_batch_size": 4},
            "parallel": {"activation_checkpointing": checkpointing},
        }
    )
    model = LlamaForCausalLM(sizes).to(getattr(torch, dtype)).train()
    selection = convert(model, config.method)
    if checkpointing:
        model.activation_checkpointing_enable()
    estimate = estimate_memory(config, sizes, selection.num_trainable, TOKENS // 4)
    kept = bytes_kept(model)
    if checkpointing:  # the estimate has one layer's recomputed part, which is no more than rest
        assert kept < estimate.activations < 4 * kept
    else:
        assert estimate.activations == pytest.approx(kept, rel=0.12)
    width = getattr(torch, dtype).itemsize
    assert estimate.base == width * sum(
        p.numel() for name, p in model.named_parameters() if not name.endswith(".slice")
    )
    assert estimate.slices == 16 * selection.num_trainable
