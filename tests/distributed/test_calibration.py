"""Selections by data: the same whoever measures, on how many processes, sharded or not."""

import json
from pathlib import Path
from typing import Any

import measured_selection
import pytest
import runs
import torch
from gloo import GlooPool
from mapped_bases import WIDE, save_in_files
from transformers import MixtralConfig

from s2ft_ray.method import Adapter, S2FTConfig, Selection, convert, convert_with, fuse
from s2ft_ray.training.run_folder import SELECTION, RunFolder


@pytest.mark.parametrize("kind", ["dense", "experts"])
@pytest.mark.parametrize("statistic", ["activation", "gradient"])
def test_statistics_are_the_same_bits_on_any_number_of_processes(
    one: GlooPool, two: GlooPool, four: GlooPool, kind: str, statistic: str
) -> None:
    (alone,) = one.run(measured_selection.measure, kind, statistic, 5, False)
    for pool in (two, four):
        for norms in pool.run(measured_selection.measure, kind, statistic, 5, False):
            assert norms.keys() == alone.keys()
            assert all(torch.equal(norms[key], alone[key]) for key in alone)


@pytest.mark.parametrize("statistic", ["activation", "gradient"])
def test_a_sharded_model_has_the_same_statistics(two: GlooPool, statistic: str) -> None:
    sharded = two.run(measured_selection.measure, "dense", statistic, 3, True)
    whole = two.run(measured_selection.measure, "dense", statistic, 3, False)
    for key, norm in whole[0].items():
        assert torch.equal(sharded[0][key], sharded[1][key])
        assert torch.equal(sharded[0][key], norm)


@pytest.mark.parametrize("selection", ["activation", "product", "gradient"])
def test_every_process_selects_the_same(two: GlooPool, four: GlooPool, selection: str) -> None:
    documents = [
        document
        for pool in (two, four)
        for document in pool.run(measured_selection.select, "dense", selection, 3)
    ]
    assert all(document == documents[0] for document in documents)


@pytest.mark.parametrize("kind", ["dense", "experts"])
@pytest.mark.parametrize("selection", ["weight", "product", "gradient"])
def test_a_sharded_model_gives_the_selection_that_a_whole_one_is_converted_by(
    two: GlooPool, kind: str, selection: str
) -> None:
    if selection == "weight":
        config = S2FTConfig(budgets={"o": 0.25, "v": 0.5, "down": 0.1}, selection="weight")
        expected = convert(measured_selection.build_model(kind), config).to_json()
        found = two.run(measured_selection.choose_weights_sharded, kind)
    else:
        expected = two.run(measured_selection.select, kind, selection, 3)[0]
        found = two.run(measured_selection.choose_sharded, kind, selection, 3)
    assert found == [expected, expected]
    model = measured_selection.build_model(kind)
    converted = convert_with(model, S2FTConfig(), Selection.from_json(expected))
    assert converted.to_json() == expected


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.save_base(tmp_path_factory.mktemp("base"))


def train_in(
    pool: GlooPool, folder: Path, base: Path, sharding: str = "replicate", **sections: Any
) -> RunFolder:
    run = make_run(pool, folder, base, sharding, **sections)
    pool.run(runs.train, run.path)
    return run


def make_run(
    pool: GlooPool, folder: Path, base: Path, sharding: str = "replicate", **sections: Any
) -> RunFolder:
    parallel = {"num_workers": pool.world_size, "sharding": sharding}
    if sharding == "hybrid":
        parallel["shard_group"] = 2
    optim = {"max_steps": 2, "global_batch_size": 8, "micro_batch_size": 2, "lr": 1e-2}
    return runs.make_run(folder, base, parallel=parallel, optim=optim, **sections)


@pytest.mark.parametrize("selection", ["activation", "gradient"])
def test_a_run_selects_the_same_with_one_and_two_workers_sharded_or_not(
    one: GlooPool, two: GlooPool, tmp_path: Path, base: Path, selection: str
) -> None:
    method = {"selection": selection}
    made = [
        train_in(pool, tmp_path / f"{pool.world_size}-{sharding}", base, sharding, method=method)
        for pool, sharding in ((one, "replicate"), (two, "replicate"), (two, "full"))
    ]
    first, *others = (run.read_json(SELECTION) for run in made)
    assert others == [first, first]
    assert first is not None
    adapter = Adapter.load(made[0].adapter)
    for name, part in adapter.slices.items():
        assert part.indices.tolist() == first["modules"][name]["indices"]
        assert float(part.delta.abs().max()) > 0
    assert adapter.config.selection == selection


@pytest.fixture(scope="module")
def experts_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    sizes = {"num_hidden_layers": 2, "num_local_experts": 4, "intermediate_size": 40}
    return runs.save_base(folder, kind=MixtralConfig, **sizes)


@pytest.mark.parametrize(
    ("kind", "selection"),
    [("dense", "gradient"), *(("experts", it) for it in ("activation", "product", "gradient"))],
)
def test_four_workers_select_the_same_in_each_layout(
    one: GlooPool,
    four: GlooPool,
    tmp_path: Path,
    base: Path,
    experts_base: Path,
    kind: str,
    selection: str,
) -> None:
    source, method = (base, experts_base)[kind == "experts"], {"selection": selection}
    alone = train_in(one, tmp_path / "one", source, method=method).read_json(SELECTION)
    assert alone is not None
    assert bool(alone["expert_channels"]) == (kind == "experts")
    for sharding in ("full", "hybrid"):
        run = train_in(four, tmp_path / sharding, source, sharding, method=method)
        assert run.read_json(SELECTION) == alone
        part = next(iter(Adapter.load(run.adapter).slices.values()))
        assert float(part.delta.abs().max()) > 0


@pytest.mark.parametrize("selection", ["activation", "gradient", "weight"])
def test_a_run_of_a_sharded_base_looks_at_data_through_one_that_is_sharded(
    two: GlooPool, tmp_path: Path, base: Path, selection: str
) -> None:
    method = {"selection": selection}
    for sharding in ("full", "replicate"):
        run = make_run(two, tmp_path / sharding, base, sharding, method=method)
        is_measured = sharding == "full" and selection != "weight"
        expected = [(True, True)] if is_measured else []  # sharded; gone before the next is loaded
        assert two.run(measured_selection.train_and_watch, run.path) == [expected, expected]


@pytest.mark.parametrize("selection", ["random", "activation"])
def test_a_run_leaves_what_it_avoids_to_the_other_adapter_and_fuses_with_it_exactly(
    two: GlooPool, tmp_path: Path, base: Path, selection: str
) -> None:
    method = {"budgets": {"o": 0.25, "down": 0.1}, "selection": selection}
    first = runs.make_run(tmp_path / "first", base, method=method)
    two.run(runs.train, first.path)
    mine = Adapter.load(first.adapter)
    second = runs.make_run(tmp_path / "second", base, method=method, parallel={"sharding": "full"})
    mine.save(second.avoided / "0")
    two.run(runs.train, second.path)
    other = Adapter.load(second.adapter)
    both = fuse([mine, other], [1.0, 1.0])
    for name, part in both.slices.items():
        for own in (mine.slices[name], other.slices[name]):
            at = torch.isin(part.indices, own.indices)
            assert at.sum() == own.count
            assert torch.equal(part.delta[:, at], own.delta)
        assert part.count == mine.slices[name].count + other.slices[name].count


def test_a_run_that_goes_on_measures_nothing(two: GlooPool, tmp_path: Path, base: Path) -> None:
    run = train_in(two, tmp_path, base, "full", method={"selection": "activation"})
    run.adapter.rename(run.adapter.with_suffix(".gone"))
    assert two.run(measured_selection.train_and_watch, run.path) == [[], []]
    assert run.adapter.exists()


# Of 20. With a gradient there is the graph beside them, and what a weight's is reduced through.
@pytest.mark.parametrize(("selection", "num_layers"), [("product", 3), ("gradient", 10)])
def test_a_worker_that_chooses_holds_its_part_and_a_few_layers(
    four: GlooPool, tmp_path: Path, selection: str, num_layers: int
) -> None:
    sizes = {**WIDE, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 20}
    base = save_in_files(tmp_path / "base", "20MB", **sizes)
    run = make_run(four, tmp_path, base, "full", method={"selection": selection})
    for rank in four.run(measured_selection.choose_and_measure, run.path):
        assert rank["shard"] < 0.3 * rank["whole"]
        layers = num_layers * rank["layer"]
        assert rank["shard"] + rank["peak"] < 1.3 * rank["shard"] + rank["largest"] + layers


@pytest.mark.parametrize("call", [1, 2])
def test_a_base_that_one_worker_cant_load_is_a_fault_of_all(
    two: GlooPool, tmp_path: Path, base: Path, call: int
) -> None:
    run = make_run(two, tmp_path, base, "full", method={"selection": "activation"})
    faults = two.run(measured_selection.train_with_a_fault, run.path, call)
    assert faults == ["model.name_or_path: can't be read here"] * 2


def test_a_run_that_goes_on_keeps_its_selection(
    one: GlooPool, two: GlooPool, tmp_path: Path, base: Path
) -> None:
    """Also where another process would round, and so select, otherwise: here told by hand."""
    run = runs.make_run(
        tmp_path,
        base,
        method={"selection": "activation"},
        optim={"max_steps": 2, "global_batch_size": 8, "micro_batch_size": 2, "lr": 1e-2},
        parallel={"num_workers": 1},
        checkpoint={"every_steps": 1},
    )
    one.run(runs.train, run.path)
    document = run.read_json(SELECTION)
    assert document is not None
    down = document["modules"]["model.layers.0.mlp.down_proj"]
    free = sorted(set(range(37)) - set(down["indices"]))
    down["indices"] = free[: down["count"]]
    run.write_json(SELECTION, document)
    for path in (run.adapter, run.checkpoints):
        path.rename(path.with_suffix(".gone"))
    two.run(runs.train, run.path)
    part = Adapter.load(run.adapter).slices["model.layers.0.mlp.down_proj"]
    assert part.indices.tolist() == down["indices"]
    assert json.loads((run.path / SELECTION).read_text()) == document
