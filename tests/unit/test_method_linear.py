"""The slice layer against the plain one: gradients, kept bytes, peak memory, shapes and dtypes."""

import copy
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_models import ALL, FAMILIES, build_model, tokens
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from s2ft_ray.method import S2FTConfig, S2FTLinear, convert, slice_layers
from s2ft_ray.method.linear import slice_linear
from s2ft_ray.method.weights import as_place, gather, put

DTYPES = [torch.float32, torch.bfloat16]
IN, OUT, INDICES = 40, 24, [1, 2, 7, 19, 23]


def build_pair(side: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, S2FTLinear]:
    torch.manual_seed(0)
    plain = nn.Linear(IN, OUT, dtype=dtype)
    return plain, S2FTLinear.take_over(copy.deepcopy(plain), side, INDICES)


def selected(layer: S2FTLinear, tensor: Tensor) -> Tensor:
    return tensor.index_select(layer.dim, layer.indices)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_slice_gradient_is_the_full_gradients_entries(family: str, dtype: torch.dtype) -> None:
    plain = build_model(family).to(dtype)
    model = copy.deepcopy(plain)
    selection = convert(model, S2FTConfig(budgets=dict.fromkeys(ALL, 0.4), seed=3))
    assert len(selection.modules) == 2 * 7
    ids = tokens()
    expected = plain(ids, labels=ids)
    actual = model(ids, labels=ids)
    assert torch.equal(actual.logits, expected.logits)
    expected.loss.backward()
    actual.loss.backward()
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    for name, layer in slice_layers(model):
        full = selected(layer, plain.get_submodule(name).weight.grad).float()
        assert layer.slice.grad.dtype == torch.float32
        assert full.norm() > 0, name
        assert (layer.slice.grad - full).norm() <= tolerance * full.norm(), name
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {f"{name}.slice" for name, _ in slice_layers(model)}


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("shape", [(), (0,), (6,), (2, 3), (2, 3, 4)])
def test_any_batch_shape_gives_the_plain_layers_gradients(
    side: str, shape: tuple[int, ...]
) -> None:
    plain, layer = build_pair(side)
    x = torch.randn(*shape, IN, requires_grad=True)
    x2 = x.detach().clone().requires_grad_()
    plain(x).square().sum().backward()
    y = layer(x2)
    assert y.shape == (*shape, OUT)
    y.square().sum().backward()
    torch.testing.assert_close(x2.grad, x.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        layer.slice.grad, selected(layer, plain.weight.grad), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("side", ["in", "out"])
def test_gradients_reach_double_precision(side: str) -> None:
    # The slice is fp32 by contract; with a double base its gradient comes of double products.
    plain, layer = build_pair(side, torch.float64)
    x = torch.randn(7, IN, dtype=torch.float64)
    plain(x).square().sum().backward()
    layer(x).square().sum().backward()
    assert torch.equal(layer.slice.grad, selected(layer, plain.weight.grad).float())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_slice_gradients_are_entries_of_the_full_one_for_any_shape(data: Any) -> None:
    size = st.integers(1, 12)
    num_in, num_out = data.draw(size), data.draw(size)
    shape = (*data.draw(st.lists(st.integers(1, 4), max_size=2)), num_in)
    side = data.draw(st.sampled_from(["in", "out"]))
    is_transposed, dtype = data.draw(st.booleans()), data.draw(st.sampled_from(DTYPES))
    count = num_in if side == "in" else num_out
    chosen = data.draw(st.sets(st.integers(0, count - 1), min_size=1))
    indices = torch.tensor(sorted(chosen))
    place = data.draw(st.sampled_from([indices, as_place(indices)]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(num_out, num_in, generator=generator).to(dtype)
    grad = torch.randn((*shape[:-1], num_out), generator=generator).to(dtype)
    full = weight.clone().requires_grad_()
    dim = -1 if side == "in" else -2
    part = gather(weight, dim, indices).float()
    part = (part.T.contiguous() if is_transposed else part).requires_grad_()
    y = slice_linear(x, weight, None, part, place, side, is_transposed=is_transposed)
    y.backward(grad)
    found, grad_x, x.grad = part.grad, x.grad, None
    torch.nn.functional.linear(x, full).backward(grad)
    expected = gather(full.grad, dim, indices).float()
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    assert found.dtype == torch.float32
    found = found.T if is_transposed else found
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grad_x, x.grad, rtol=tolerance, atol=tolerance)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_what_is_put_is_what_is_gathered_and_nothing_else_changes(data: Any) -> None:
    experts = data.draw(st.none() | st.integers(1, 4))
    sizes = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    dim = data.draw(st.sampled_from([-1, -2]))
    weight = torch.randn(*(() if experts is None else (experts,)), *sizes)
    count = data.draw(st.integers(1, sizes[dim]))
    rows = [
        sorted(data.draw(st.permutations(range(sizes[dim])))[:count]) for _ in range(experts or 1)
    ]
    indices = torch.tensor(rows if experts else rows[0])
    before = weight.clone()
    values = torch.randn_like(gather(weight, dim, indices))
    for place in (indices, as_place(indices)):
        put(weight, dim, place, values)
        assert torch.equal(gather(weight, dim, place), values)
        put(weight, dim, place, gather(before, dim, indices))
        assert torch.equal(weight, before)


def test_the_input_gets_no_gradient_where_it_wants_none() -> None:
    _, layer = build_pair("in")
    x = torch.randn(4, IN)
    layer(x).sum().backward()
    assert x.grad is None
    assert layer.slice.grad is not None


def test_two_forwards_before_one_backward_add_up() -> None:
    _, layer = build_pair("in")
    first, second = torch.randn(4, IN), torch.randn(5, IN)
    layer(first).square().sum().backward()
    layer(second).square().sum().backward()
    expected = layer.slice.grad.clone()
    layer.slice.grad = None
    (layer(first).square().sum() + layer(second).square().sum()).backward()
    torch.testing.assert_close(layer.slice.grad, expected, rtol=1e-5, atol=1e-5)


def test_a_write_back_between_forward_and_backward_is_an_error() -> None:
    _, layer = build_pair("in")
    loss = layer(torch.randn(4, IN, requires_grad=True)).sum()
    layer.write_back()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def kept_by_graph(run: Any, parameters: list[Tensor]) -> list[Tensor]:
    """The tensors that the graph saves, one for each storage, parameters and buffers apart."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in own:
            kept[pointer] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    assert output.requires_grad
    return list(kept.values())


def kept_bytes(run: Any, model: nn.Module) -> int:
    kept = kept_by_graph(run, [*model.parameters(), *model.buffers()])
    return sum(tensor.untyped_storage().nbytes() for tensor in kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_input_side_keeps_the_selected_columns_and_no_view(dtype: torch.dtype) -> None:
    _, layer = build_pair("in", dtype)
    x = torch.randn(2, 50, IN, dtype=dtype, requires_grad=True)
    own = [*layer.parameters(), *layer.buffers()]
    (kept,) = kept_by_graph(lambda: layer(x), own)
    assert kept.shape == (2, 50, len(INDICES))
    # The storage, not the tensor: a view would pin all of x.
    assert kept.untyped_storage().nbytes() == 2 * 50 * len(INDICES) * dtype.itemsize


def test_the_output_side_keeps_its_input_without_a_copy() -> None:
    _, layer = build_pair("out")
    x = torch.randn(50, IN, requires_grad=True)
    (kept,) = kept_by_graph(lambda: layer(x), [*layer.parameters(), *layer.buffers()])
    assert kept.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def test_under_autocast_the_kept_columns_have_the_outputs_dtype() -> None:
    _, layer = build_pair("in")
    x = torch.randn(50, IN, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        (kept,) = kept_by_graph(lambda: layer(x), [*layer.parameters(), *layer.buffers()])
    assert kept.untyped_storage().nbytes() == 50 * len(INDICES) * 2


@pytest.mark.parametrize("side", ["in", "out"])
def test_autocast_gives_the_plain_layers_gradients(side: str) -> None:
    plain, layer = build_pair(side)
    x = torch.randn(6, IN, requires_grad=True)
    x2 = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = plain(x), layer(x2)
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, expected)
    expected.float().square().sum().backward()
    actual.float().square().sum().backward()
    assert x2.grad.dtype == layer.slice.grad.dtype == torch.float32
    torch.testing.assert_close(x2.grad, x.grad, rtol=2**-7, atol=2**-7)
    full = selected(layer, plain.weight.grad)
    torch.testing.assert_close(layer.slice.grad, full, rtol=2**-7, atol=2**-7)


def test_without_gradients_nothing_is_kept_and_nothing_gathered() -> None:
    _, layer = build_pair("in")
    with torch.no_grad():
        assert not layer(torch.randn(3, IN)).requires_grad
    layer.slice.requires_grad_(False)
    x = torch.randn(3, IN, requires_grad=True)
    assert kept_by_graph(lambda: layer(x), [*layer.parameters(), *layer.buffers()]) == []


def test_a_converted_model_keeps_the_slices_beyond_the_frozen_model() -> None:
    frozen = build_model("llama").requires_grad_(False)
    model = build_model("llama")
    selection = convert(model, S2FTConfig(budgets={"o": 0.25, "down": 0.1}))
    embedded = frozen.get_input_embeddings()(tokens()).detach().requires_grad_()
    before = kept_bytes(lambda: frozen(inputs_embeds=embedded).logits, frozen)
    after = kept_bytes(lambda: model(inputs_embeds=embedded).logits, model)
    columns = sum(len(module.indices) for module in selection.modules.values())
    assert after - before == tokens().numel() * columns * 4


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make and the graph or the caller keeps alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tensors_of((args, kwargs))}
        for tensor in tensors_of(output):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._seen and storage._cdata not in given:
                self._seen[storage._cdata] = storage.nbytes()
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata)
        self.peak = max(self.peak, self.live)
        return output

    def _free(self, key: int) -> None:
        self.live -= self._seen.pop(key)


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def peak_bytes(run: Any) -> int:
    with LiveBytes() as counter:
        run()
    return counter.peak


def test_live_bytes_counts_what_is_alive() -> None:
    def run() -> None:
        x = torch.zeros(100)
        x = x + 1  # two alive, then one
        x.view(10, 10).mul_(2)

    assert peak_bytes(run) == 2 * 400


def test_peak_memory_is_the_frozen_layers_and_the_slices() -> None:
    size, num_tokens, indices = 256, 512, range(16)
    stack = nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in range(4)))
    frozen = copy.deepcopy(stack).requires_grad_(False)
    for linear in stack:
        S2FTLinear.take_over(linear, "in", indices)
    x = torch.randn(num_tokens, size, requires_grad=True)
    limit = peak_bytes(lambda: frozen(x).sum().backward())
    peak = peak_bytes(lambda: stack(x).sum().backward())
    # Kept columns and the slices' gradients, with one spare of each in flight.
    slices = 5 * len(indices) * (num_tokens + size) * 4
    assert limit < peak <= limit + slices
    assert slices < size * size * 4  # one full dW would not go through


def test_sides_and_counts_are_in_the_repr() -> None:
    _, layer = build_pair("out")
    assert "side=out, num_selected=5" in repr(layer)
