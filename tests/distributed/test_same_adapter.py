"""A plain loop, the Hugging Face Trainer and our training step: one adapter."""

import pytest
import same_adapter
import torch
from gloo import GlooPool


@pytest.mark.parametrize("layout", ["gathered", "permuted"])
def test_three_loops_give_the_same_adapter_on_the_same_order_of_data(
    one: GlooPool, layout: str
) -> None:
    adapters = one.run(same_adapter.train_three_ways, layout)[0]
    expected = adapters["plain"]
    assert min(float(part.delta.norm()) for part in expected.slices.values()) > 0.01
    for name, adapter in adapters.items():
        assert adapter.base == expected.base
        for module, part in adapter.slices.items():
            twin = expected.slices[module]
            assert torch.equal(part.indices, twin.indices)
            torch.testing.assert_close(
                part.delta, twin.delta, rtol=0, atol=1e-6, msg=f"{name}: {module}"
            )
