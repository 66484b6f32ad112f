"""Several adapters of one base as one."""

import math

import pytest
import torch
from method_models import build_model, snapshot

from s2ft_ray.errors import AdapterError
from s2ft_ray.method import (
    Adapter,
    S2FTConfig,
    convert,
    extract_adapter,
    fuse,
    restore,
    slice_layers,
)


def train_adapter(seed: int, base: int = 0, **config: object) -> Adapter:
    model = build_model(seed=base)
    convert(model, S2FTConfig(seed=seed, **config))
    generator = torch.Generator().manual_seed(seed)
    for _, layer in slice_layers(model):
        layer.slice.data += torch.randn(layer.slice.shape, generator=generator)
    adapter = extract_adapter(model)
    restore(model)
    return adapter


def test_a_fused_adapter_adds_the_weighted_sum_of_the_deltas() -> None:
    first = train_adapter(0, budgets={"o": 0.5, "down": 0.5})
    second = train_adapter(1, budgets={"down": 0.5, "gate": 0.2}, layers=[1])
    model = build_model()
    expected = snapshot(model)
    for adapter, weight in ((first, 0.25), (second, 2.0)):
        for name, part in adapter.slices.items():
            delta = part.delta * weight
            expected[f"{name}.weight"].index_add_(part.dim, part.indices.long(), delta)
    fused = fuse([first, second], weights=[0.25, 2.0])
    fused.switch_into(model)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    down = "model.layers.1.mlp.down_proj"
    union = {*first.slices[down].indices.tolist(), *second.slices[down].indices.tolist()}
    assert fused.slices[down].indices.tolist() == sorted(union)
    assert fused.slices[down].indices.dtype == torch.int32
    assert fused.training["fused"][1] == {"fingerprint": second.fingerprint, "weight": 2.0}


def test_weights_are_equal_shares_by_default_and_one_adapter_is_itself() -> None:
    first = train_adapter(0)
    second = train_adapter(1)
    assert fuse([first, second]).fingerprint == fuse([first, second], [0.5, 0.5]).fingerprint
    assert fuse([first]).fingerprint == first.fingerprint


def test_a_fused_adapter_is_saved_and_loaded(tmp_path: object) -> None:
    fused = fuse([train_adapter(0), train_adapter(1)])
    fused.save(str(tmp_path))
    assert Adapter.load(str(tmp_path)).fingerprint == fused.fingerprint


@pytest.mark.parametrize("weights", [[1.0], [1.0, math.nan], [1.0, 1.0, 1.0]])
def test_weights_are_one_finite_number_each(weights: list[float]) -> None:
    with pytest.raises(AdapterError, match="not 2 finite numbers"):
        fuse([train_adapter(0), train_adapter(1)], weights)


def test_other_bases_and_no_adapters_are_refused() -> None:
    with pytest.raises(AdapterError, match="different bases"):
        fuse([train_adapter(0), train_adapter(0, base=1)])
    with pytest.raises(AdapterError, match="no adapter"):
        fuse([])
