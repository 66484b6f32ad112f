from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import s2ft_ray.serving.routing as routing_module
from s2ft_ray.config import S2FTConfig
from s2ft_ray.errors import AdapterError
from s2ft_ray.method import Adapter, AdapterSlice, BaseInfo
from s2ft_ray.serving.batched_layers import BatchedLayers
from s2ft_ray.serving.device_slots import DeviceSlots, Slot
from s2ft_ray.serving.engine_stats import AdapterEvents
from s2ft_ray.serving.requests import AdapterKey
from s2ft_ray.serving.routing import PoolRanges, Routing

WIDTH, INNER = 16, 24
NUM_ADAPTERS = 5
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.15}


class Model(nn.Module):
    """`out`'s rows and `back`'s columns are what adapters change, and those of the second ones."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.out = nn.Linear(WIDTH, INNER, bias=False, dtype=dtype)
        self.back = nn.Linear(INNER, WIDTH, bias=False, dtype=dtype)
        self.out2 = nn.Linear(WIDTH, INNER, bias=False, dtype=dtype)
        self.back2 = nn.Linear(INNER, WIDTH, bias=False, dtype=dtype)


def make_adapter(
    draw: torch.Generator, num_out: int, num_in: int, has_second: bool = True
) -> Adapter:
    slices = {}
    for second in ("", "2") if has_second else ("",):
        if num_out:
            rows = torch.randperm(INNER, generator=draw)[:num_out].sort().values.int()
            delta = torch.randn(num_out, WIDTH, generator=draw)
            slices[f"out{second}"] = AdapterSlice("out", rows, delta, size=INNER)
        if num_in:
            columns = torch.randperm(INNER, generator=draw)[:num_in].sort().values.int()
            delta = torch.randn(WIDTH, num_in, generator=draw)
            slices[f"back{second}"] = AdapterSlice("in", columns, delta, size=INNER)
    return Adapter(slices, BaseInfo(None, None, "b"), S2FTConfig())


def place(slots: DeviceSlots, layers: BatchedLayers, adapter: Adapter, number: int) -> Slot:
    key = AdapterKey("t.a", str(number), adapter.fingerprint)
    slot = slots.allocate(key, slots.layout_of(adapter))
    assert slot is not None
    slots.copy_in(slot, adapter)
    layers.prepare(key, adapter)
    return slot


def expected(
    layer: nn.Linear, name: str, x: Tensor, mix: list[tuple[Adapter | None, int]]
) -> Tensor:
    """Each request alone, in fp32, with its adapter's delta in the weight."""
    parts, at = [], 0
    for adapter, num_tokens in mix:
        weight = layer.weight.detach().float().clone()
        part = adapter.slices.get(name) if adapter else None
        if part is not None:
            delta = part.delta.to(layer.weight.dtype).float()
            weight.index_add_(0 if part.side == "out" else 1, part.indices.long(), delta)
        parts.append(x[at : at + num_tokens].float() @ weight.T)
        at += num_tokens
    return torch.cat(parts)


def route(ranges: list[tuple[Slot, int, int]], slots: DeviceSlots, capability: str) -> Routing:
    """Route as on a CPU of another capability, or as on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        if capability == "CUDA":
            limits = replace(routing_module._CUDA, fewest_in_all=8)  # some blocks, too
            patch.setattr(routing_module, "_limits", lambda _: limits)
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        return Routing(ranges, slots)


class Kernels:
    """What the kernels of a GPU do, a token at a time."""

    @staticmethod
    def add_sums(x: Tensor, y: Tensor, pool: Tensor, places: Tensor, ranges: PoolRanges) -> None:
        for token, rows in Kernels.rows_of(ranges):
            y[token] += x[token, places[rows]] @ pool[rows]

    @staticmethod
    def add_dots(x: Tensor, y: Tensor, pool: Tensor, places: Tensor, ranges: PoolRanges) -> None:
        for token, rows in Kernels.rows_of(ranges):
            y[token, places[rows]] += pool[rows] @ x[token]

    @staticmethod
    def rows_of(ranges: PoolRanges) -> Iterator[tuple[int, slice]]:
        counts = ranges.counts.tolist()
        assert ranges.largest == max(counts)
        for token, start, count in zip(
            ranges.tokens.tolist(), ranges.starts.tolist(), counts, strict=True
        ):
            yield token, slice(start, start + count)


sizes = st.tuples(st.sampled_from([0, 1, 3, 3, 7]), st.sampled_from([0, 1, 4, 4, 9]), st.booleans())
requests = st.tuples(st.integers(-1, NUM_ADAPTERS - 1), st.sampled_from([1, 1, 1, 1, 2, 5, 8, 11]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("capability", ["AVX2", "AVX512", "CUDA"])
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    of=st.lists(sizes, min_size=NUM_ADAPTERS, max_size=NUM_ADAPTERS),
    mix=st.lists(requests, min_size=1, max_size=20),
    seed=st.integers(0, 2**16),
)
def test_any_mix_of_tokens_gets_what_each_adapter_alone_gives(
    dtype: torch.dtype,
    capability: str,
    of: list[tuple[int, int, bool]],
    mix: list[tuple[int, int]],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    model = Model(dtype)
    slots = DeviceSlots(WIDTH, dtype, torch.device("cpu"), 2**14, AdapterEvents())
    layers = BatchedLayers(model, slots)
    layers._kernels = Kernels
    adapters = [make_adapter(draw, *size) for size in of]
    placed = [place(slots, layers, adapter, i) for i, adapter in enumerate(adapters)]
    ranges, at = [], 0
    for number, num_tokens in mix:
        if number >= 0:
            ranges.append((placed[number], at, at + num_tokens))
        at += num_tokens
    whole = [(adapters[number] if number >= 0 else None, num) for number, num in mix]
    layers.routing = route(ranges, slots, capability)
    with torch.no_grad():
        for name, module in model.named_children():
            x = torch.randn(at, module.in_features).to(dtype)
            for _ in range(2):  # the second pass follows the plan of the first
                served = module(x[None])[0].float()
                wanted = expected(module, name, x, whole)
                torch.testing.assert_close(served, wanted, atol=TOLERANCE[dtype], rtol=0.02)


def test_modules_that_lie_alike_in_the_adapters_share_a_plan() -> None:
    draw = torch.Generator().manual_seed(0)
    slots = DeviceSlots(WIDTH, torch.float32, torch.device("cpu"), 2**14, AdapterEvents())
    layers = BatchedLayers(Model(torch.float32), slots)
    placed = [place(slots, layers, make_adapter(draw, 3, 4), i) for i in range(3)]
    assert len({id(slot.layout) for slot in placed}) == 1
    routing = Routing([(slot, i, i + 1) for i, slot in enumerate(placed)], slots)
    built = []
    with pytest.MonkeyPatch.context() as patch:
        build = routing._build_alike
        patch.setattr(routing, "_build_alike", lambda *of: built.append(of) or build(*of))
        for name in ("back", "back2"):
            assert routing.plan(name, INNER, WIDTH) is not None
        assert len(built) == 1
        routing.plan("out2", WIDTH, INNER)
    assert len(built) == 2


def test_single_tokens_of_many_alike_adapters_are_one_product_where_that_is_faster() -> None:
    draw = torch.Generator().manual_seed(0)
    model = Model(torch.float32)
    slots = DeviceSlots(WIDTH, torch.float32, torch.device("cpu"), 2**14, AdapterEvents())
    layers = BatchedLayers(model, slots)
    adapters = [make_adapter(draw, 3, 4) for _ in range(9)]
    ranges = [(place(slots, layers, it, i), i, i + 1) for i, it in enumerate(adapters)]
    x = torch.randn(9, INNER, generator=draw)
    wanted = expected(model.back, "back", x, [(adapter, 1) for adapter in adapters])
    num_blocks = {}
    for capability in ("AVX2", "AVX512"):
        layers.routing = route(ranges, slots, capability)
        with torch.no_grad():
            torch.testing.assert_close(model.back(x), wanted, atol=2e-5, rtol=0.02)
        plan = layers.routing.plan("back", INNER, WIDTH)
        assert plan is not None
        num_blocks[capability] = [block.shape for block in plan.blocks]
    assert num_blocks == {"AVX2": [(9, 1, 4)], "AVX512": []}


def test_without_a_routing_the_model_is_the_base_bitwise() -> None:
    torch.manual_seed(0)
    model = Model(torch.float32)
    x = torch.randn(3, WIDTH)
    before = model.out(x)
    slots = DeviceSlots(WIDTH, torch.float32, torch.device("cpu"), 2**14, AdapterEvents())
    layers = BatchedLayers(model, slots)
    slot = place(slots, layers, make_adapter(torch.Generator(), 3, 3), 0)
    assert torch.equal(model.out(x), before)
    layers.routing = Routing([(slot, 0, 1)], slots)
    with torch.no_grad():
        served = model.out(x)
    assert not torch.equal(served[0], before[0])
    assert torch.equal(served[1:], before[1:])  # the other tokens are untouched
    layers.remove()
    assert torch.equal(model.out(x), before)


def test_an_adapter_of_a_module_that_the_base_lacks_is_refused() -> None:
    slots = DeviceSlots(WIDTH, torch.float32, torch.device("cpu"), 2**14, AdapterEvents())
    layers = BatchedLayers(Model(torch.float32), slots)
    part = AdapterSlice("in", torch.arange(2).int(), torch.zeros(WIDTH, 2))
    foreign = Adapter({"elsewhere": part}, BaseInfo(None, None, "b"), S2FTConfig())
    with pytest.raises(AdapterError, match="no module elsewhere"):
        layers.prepare(AdapterKey("t.a", "1", foreign.fingerprint), foreign)
