"""The method and the step on a GPU: the numbers of the CPU, and where the memory goes."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from s2ft_ray.config import S2FTConfig
from s2ft_ray.method import convert, extract_adapter, restore, slice_layers

CONFIG = S2FTConfig(budgets={"o": 0.25, "v": 0.5, "up": 0.05, "down": 0.05})


def build(dtype: torch.dtype, **sizes: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    defaults = {
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    }
    return LlamaForCausalLM(LlamaConfig(**{**defaults, **sizes})).to("cuda", dtype)


def train(model: LlamaForCausalLM, steps: int, batch: int = 4, seq_len: int = 64) -> float:
    """Train `steps` steps on the same random tokens; return the last loss."""
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True
    )
    ids = torch.randint(0, model.config.vocab_size, (batch, seq_len), device="cuda")
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
    return float(loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slice_gradients_are_entries_of_the_full_gradient(dtype: torch.dtype) -> None:
    model = build(dtype)
    ids = torch.randint(0, 512, (2, 32), device="cuda")
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    full = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    convert(model, CONFIG)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for name, layer in slice_layers(model):
        assert layer.slice.device.type == "cuda"
        assert layer.slice.dtype == torch.float32
        expected = full[f"{name}.weight"].index_select(layer.dim, layer.indices).float()
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2 * float(expected.abs().max())
        torch.testing.assert_close(layer.slice.grad, expected, atol=tolerance, rtol=1e-3)


def test_training_moves_the_slices_and_restore_brings_the_base_back() -> None:
    model = build(torch.bfloat16)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    convert(model, CONFIG)
    first = train(model, 1)
    assert train(model, 20) < first
    adapter = extract_adapter(model)
    restore(model)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    adapter.switch_into(model)
    changed = [name for name, p in model.state_dict().items() if not torch.equal(p, before[name])]
    assert {name.removesuffix(".weight") for name in changed} == set(adapter.slices)
    adapter.switch_out(model)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_a_step_takes_less_memory_than_full_fine_tuning() -> None:
    peaks = {}
    for method in ("s2ft", "full"):
        model = build(torch.bfloat16, hidden_size=1024, intermediate_size=2816)
        if method == "s2ft":
            convert(model, S2FTConfig())
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        train(model, 2)
        peaks[method] = torch.cuda.max_memory_allocated() - held
        del model
    assert peaks["s2ft"] < 0.7 * peaks["full"]
