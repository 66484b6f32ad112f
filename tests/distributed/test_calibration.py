"""Selections by data: the same whoever measures, on how many processes, sharded or not."""

import json
from pathlib import Path
from typing import Any

import measured_selection
import pytest
import runs
import torch
from gloo import GlooPool

from s2ft_ray.method import Adapter, S2FTConfig, Selection, convert, convert_with
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
    parallel = {"num_workers": pool.world_size, "sharding": sharding}
    optim = {"max_steps": 2, "global_batch_size": 8, "micro_batch_size": 2, "lr": 1e-2}
    run = runs.make_run(folder, base, parallel=parallel, optim=optim, **sections)
    pool.run(runs.train, run.path)
    return run


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
