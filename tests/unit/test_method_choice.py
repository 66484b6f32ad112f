"""What each selection takes, against a plain computation on the model's own modules."""

from typing import Any

import pytest
import torch
from method_models import BATCHES, build_model

from s2ft_ray.method import Adapter, S2FTConfig, convert, extract_adapter, restore

NUM_LAYERS, HEADS, GROUP, HEAD_DIM, CHANNELS = 3, 8, 4, 8, 88  # a Llama with 2 KV heads
BUDGETS = {"o": 0.25, "v": 0.5, "up": 0.1, "down": 0.2}
Scores = dict[str, torch.Tensor]
"""By structure: float64 [layers, units]."""


def build() -> Any:
    return build_model(num_hidden_layers=NUM_LAYERS)


def by_unit(q: Any, k: Any, v: Any, o: Any, up: Any, gate: Any, down: Any) -> Scores:
    """Add the squares of a layer's matrices up by head and channel."""
    q, k, v, o, up, gate, down = (it.double().square() for it in (q, k, v, o, up, gate, down))
    heads = torch.zeros(HEADS, dtype=torch.float64)
    for head in range(HEADS):
        mine, kv = head * HEAD_DIM, head // GROUP * HEAD_DIM
        heads[head] = q[mine : mine + HEAD_DIM].sum() + o[:, mine : mine + HEAD_DIM].sum()
        heads[head] += k[kv : kv + HEAD_DIM].sum() + v[kv : kv + HEAD_DIM].sum()
    return {"heads": heads, "channels": up.sum(1) + gate.sum(1) + down.sum(0)}


def matrices(layer: Any) -> list[torch.nn.Parameter]:
    attention = [getattr(layer.self_attn, f"{it}_proj").weight for it in "qkvo"]
    return attention + [getattr(layer.mlp, f"{it}_proj").weight for it in ("up", "gate", "down")]


def stack(layers: list[Scores]) -> Scores:
    return {kind: torch.stack([it[kind] for it in layers]) for kind in ("heads", "channels")}


def weights(model: Any) -> Scores:
    return stack([by_unit(*(it.detach() for it in matrices(x))) for x in model.model.layers])


def activations(model: Any) -> Scores:
    """Square what o and down are given for the tokens that count."""
    given: dict[torch.nn.Module, list[torch.Tensor]] = {}
    met = {
        "heads": [layer.self_attn.o_proj for layer in model.model.layers],
        "channels": [layer.mlp.down_proj for layer in model.model.layers],
    }
    hooks = [
        module.register_forward_hook(lambda m, args, _: given.setdefault(m, []).append(args[0]))
        for modules in met.values()
        for module in modules
    ]
    with torch.no_grad():
        for batch in BATCHES:
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for hook in hooks:
        hook.remove()
    masks = [batch["attention_mask"].bool() for batch in BATCHES]
    sums: Scores = {}
    for kind, modules in met.items():
        width = HEAD_DIM if kind == "heads" else 1
        rows = [
            torch.cat([x[mask] for x, mask in zip(given[module], masks, strict=True)])
            for module in modules
        ]
        sums[kind] = torch.stack([x.double().square().sum(0).view(-1, width).sum(1) for x in rows])
    return sums


def gradients(model: Any) -> Scores:
    total: list[Scores] = []
    for batch in BATCHES:
        model.zero_grad()
        model(**batch).loss.backward()
        total.append(stack([by_unit(*(it.grad for it in matrices(x))) for x in model.model.layers]))
    model.zero_grad()
    return {kind: sum(it[kind] for it in total) for kind in total[0]}


def score(model: Any, selection: str) -> Scores:
    if selection == "weight":
        return weights(model)
    if selection == "gradient":
        return gradients(model)
    seen = activations(model)
    if selection == "product":
        return {kind: squares * weights(model)[kind] for kind, squares in seen.items()}
    return seen


def expect(
    scores: Scores,
    subset: str,
    allocation: str,
    layers: list[int],
    taken: dict[str, set[tuple[int, int]]],
) -> dict[str, dict[int, list[int]]]:
    """Choose by sorting: units of each projection in BUDGETS, by layer."""
    chosen: dict[str, dict[int, list[int]]] = {}
    for projection, budget in BUDGETS.items():
        kind = "heads" if projection in "ov" else "channels"
        pools = [layers] if allocation == "global" else [[layer] for layer in layers]
        chosen[projection] = {}
        for pool in pools:
            ranked = [
                (float(value) * (1 if subset == "small" else -1), layer, unit)
                for layer in pool
                for unit, value in enumerate(scores[kind][layer])
                if (layer, unit) not in taken.get(kind, set())
            ]
            places = [(layer, unit) for _, layer, unit in sorted(ranked)]
            num_units = len(scores[kind][0])
            if projection == "v":
                places = list(dict.fromkeys((layer, head // GROUP) for layer, head in places))
                num_units = HEADS // GROUP
            for layer, unit in places[: max(1, round(budget * num_units * len(pool)))]:
                chosen[projection].setdefault(layer, []).append(unit)
    return {it: {k: sorted(v) for k, v in units.items()} for it, units in chosen.items()}


def found(selection: Any) -> dict[str, dict[int, list[int]]]:
    """Read the units of each projection off the rows and columns."""
    chosen: dict[str, dict[int, list[int]]] = {it: {} for it in BUDGETS}
    for name, module in selection.modules.items():
        layer, projection = int(name.split(".")[2]), name.rpartition(".")[2].removesuffix("_proj")
        size = HEAD_DIM if projection in "ov" else 1
        chosen[projection][layer] = sorted({index // size for index in module.indices})
        assert len(module.indices) == size * len(chosen[projection][layer])
    return chosen


@pytest.mark.parametrize("selection", ["weight", "activation", "product", "gradient"])
@pytest.mark.parametrize("subset", ["small", "large"])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("layers", [None, [0, 2]])
def test_each_budget_takes_its_end_of_one_order(
    selection: str, subset: str, allocation: str, layers: list[int] | None
) -> None:
    model = build()
    expected = expect(
        score(model, selection), subset, allocation, layers or [*range(NUM_LAYERS)], {}
    )
    config = S2FTConfig(
        budgets=BUDGETS, selection=selection, subset=subset, allocation=allocation, layers=layers
    )
    calibration = None if selection == "weight" else BATCHES
    assert found(convert(model, config, calibration)) == expected


def adapter_of(model: Any, config: S2FTConfig) -> tuple[Adapter, dict[str, set[tuple[int, int]]]]:
    """An adapter, and the heads and channels that it takes (a KV head the heads it serves)."""
    units = found(convert(model, config))
    adapter = extract_adapter(model)
    restore(model)
    taken: dict[str, set[tuple[int, int]]] = {"heads": set(), "channels": set()}
    for projection, by_layer in units.items():
        for layer, numbers in by_layer.items():
            for number in numbers:
                if projection == "v":
                    heads = range(number * GROUP, (number + 1) * GROUP)
                    taken["heads"] |= {(layer, head) for head in heads}
                else:
                    kind = "heads" if projection == "o" else "channels"
                    taken[kind].add((layer, number))
    return adapter, taken


@pytest.mark.parametrize("selection", ["weight", "activation", "product", "gradient"])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_units_of_other_adapters_are_no_candidates(selection: str, allocation: str) -> None:
    model = build()
    # Unevenly over the layers, so that what is left of each differs.
    first, taken = adapter_of(model, S2FTConfig(budgets={"o": 0.25, "up": 0.3}, layers=[0], seed=1))
    second, more = adapter_of(model, S2FTConfig(budgets={"v": 0.5, "down": 0.2}, layers=[1]))
    taken = {kind: units | more[kind] for kind, units in taken.items()}
    expected = expect(score(model, selection), "small", allocation, [*range(NUM_LAYERS)], taken)
    config = S2FTConfig(budgets=BUDGETS, selection=selection, allocation=allocation)
    calibration = None if selection == "weight" else BATCHES
    chosen = found(convert(model, config, calibration, avoid=[first, second]))
    assert chosen == expected
    assert (
        not {(x, unit) for x, units in chosen["up"].items() for unit in units} & taken["channels"]
    )
