"""Deltas as numbers and as pictures."""

import json
import math
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from method_models import build_model
from safetensors.torch import save_file

from s2ft_ray.config import S2FTConfig, parse_config
from s2ft_ray.method import Adapter, AdapterSlice, BaseInfo, Selection, convert
from s2ft_ray.registry.deltas import ModuleDelta, measure_deltas
from s2ft_ray.registry.figures import (
    _arrange,
    _selected_shares,
    draw_deltas,
    draw_loss,
    draw_selection,
)
from s2ft_ray.registry.journal import Entry, Journal, Point
from s2ft_ray.registry.tracking import TrackedRun

DOWN, UP = "model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj"


def adapter_of(**slices: AdapterSlice) -> Adapter:
    names = {"down": DOWN, "up": UP}
    base = BaseInfo("base", None, "0" * 64)
    return Adapter({names[key]: part for key, part in slices.items()}, base, S2FTConfig())


def part(side: str, indices: list[int], delta: list[list[float]]) -> AdapterSlice:
    return AdapterSlice(side, torch.tensor(indices, dtype=torch.int32), torch.tensor(delta))


@pytest.fixture
def base_folder(tmp_path: Path) -> Path:
    weights = {
        f"{DOWN}.weight": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], dtype=torch.bfloat16),
        f"{UP}.weight": torch.tensor([[0.0, 0.0], [3.0, 4.0]]),
    }
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_a_delta_is_measured_against_the_entries_that_it_changes(base_folder: Path) -> None:
    adapter = adapter_of(
        down=part("in", [0, 2], [[0.3, 0.0], [0.0, 0.4]]), up=part("out", [1], [[6.0, 8.0]])
    )
    down, up = measure_deltas(adapter, base_folder)
    assert down.norm == pytest.approx(0.5)
    assert down.relative == pytest.approx(0.5 / math.sqrt(1 + 9 + 16 + 36))
    assert (up.norm, up.relative) == (pytest.approx(10.0), pytest.approx(2.0))
    assert up.parent_cosine is None
    assert down.values == {
        f"delta/{DOWN}/norm": down.norm,
        f"delta/{DOWN}/relative_norm": down.relative,
    }


def test_the_parents_cosine_counts_the_entries_that_both_have(base_folder: Path) -> None:
    adapter = adapter_of(down=part("in", [0, 2], [[1.0, 1.0], [0.0, 1.0]]))
    same = adapter_of(down=part("in", [0, 2], [[2.0, 2.0], [0.0, 2.0]]))
    shifted = adapter_of(down=part("in", [1, 2], [[5.0, 1.0], [5.0, 1.0]]))
    opposite = adapter_of(down=part("in", [0, 2], [[-1.0, -1.0], [0.0, -1.0]]))
    cosines = [
        measure_deltas(adapter, base_folder, parent)[0].parent_cosine
        for parent in (same, shifted, opposite)
    ]
    assert cosines[0] == pytest.approx(1.0)
    assert cosines[1] == pytest.approx(2.0 / (math.sqrt(3) * math.sqrt(52)))
    assert cosines[2] == pytest.approx(-1.0)


def test_a_sharded_checkpoint_is_read_by_its_index(tmp_path: Path) -> None:
    save_file({f"{UP}.weight": torch.tensor([[3.0, 4.0]])}, tmp_path / "two.safetensors")
    index = f'{{"weight_map": {{"{UP}.weight": "two.safetensors"}}}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)
    (tmp_path / "config.json").write_text("{}")
    delta = measure_deltas(adapter_of(up=part("out", [0], [[0.3, 0.4]])), tmp_path)[0]
    assert delta.relative == pytest.approx(0.1)


def test_experts_and_transposed_weights_are_measured_too(tmp_path: Path) -> None:
    matrices = {
        f"model.layers.0.mlp.experts.{expert}.down_proj.weight": torch.full((1, 2), expert + 1.0)
        for expert in range(2)
    }
    matrices["c_fc.weight"] = torch.tensor([[3.0, 1.0], [4.0, 1.0]])
    save_file(matrices, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe"}')
    indices = torch.tensor([[0], [1]], dtype=torch.int32)
    experts = AdapterSlice("in", indices, torch.tensor([[[1.0]], [[2.0]]]))
    conv = AdapterSlice("out", indices[0], torch.tensor([[0.3, 0.4]]), transposed=True)
    name = "model.layers.0.mlp.experts.down_proj"
    adapter = Adapter({name: experts, "c_fc": conv}, BaseInfo(None, None, "0" * 64), S2FTConfig())
    first, second = measure_deltas(adapter, tmp_path, adapter)
    assert first.relative == pytest.approx(1.0)
    assert second.relative == pytest.approx(0.1)
    assert (first.parent_cosine, second.parent_cosine) == (pytest.approx(1), pytest.approx(1))


def test_rows_of_a_figure_are_told_apart_by_their_paths() -> None:
    rows = _arrange([ModuleDelta(f"h.0.{m}.c_proj", 1, 1, None) for m in ("attn", "mlp")])[0]
    assert rows == ["attn.c_proj", "mlp.c_proj"]
    rows = _arrange([ModuleDelta(f"h.0.{m}_proj", 1, 1, None) for m in ("mlp.down", "attn.o")])[0]
    assert rows == ["o_proj", "down_proj"]


def test_a_loss_curve_is_a_picture_with_both_colours(tmp_path: Path) -> None:
    points = [Point("train", step, 0.0, {"loss": 4 / step}) for step in range(1, 60)]
    points += [Point("eval", step, 0.0, {"loss": 4.5 / step}) for step in (1, 20, 59)]
    path = tmp_path / "figures" / "loss.png"
    draw_loss(points, path, "acme.bot")
    pixels = imread(path)[..., :3]
    for colour in ((0x44, 0x77, 0xAA), (0xCC, 0x33, 0x11)):
        wanted = torch.tensor(colour) / 255
        assert (torch.tensor(pixels) - wanted).abs().amax(-1).lt(0.02).sum() > 50


def test_a_run_without_evaluation_or_with_one_step_can_be_drawn(tmp_path: Path) -> None:
    draw_loss([Point("train", 1, 0.0, {"loss": 2.0})], tmp_path / "one.png", "one step")
    draw_loss([Point("eval", 0, 0.0, {"loss": 2.0})], tmp_path / "eval.png", "the base")
    assert imread(tmp_path / "one.png").shape == imread(tmp_path / "eval.png").shape


def test_the_heatmap_grows_with_the_layers_and_stays_bounded(tmp_path: Path) -> None:
    sizes = []
    for num_layers in (1, 32, 200):
        deltas = [
            ModuleDelta(f"model.layers.{layer}.{name}", 1.0, 0.1 * layer, None)
            for layer in range(num_layers)
            for name in ("self_attn.o_proj", "mlp.down_proj")
        ]
        draw_deltas(deltas, tmp_path / f"{num_layers}.png", "acme.bot")
        sizes.append(imread(tmp_path / f"{num_layers}.png").shape[1])
    assert sizes[0] < sizes[1] < sizes[2] == 24 * 120


def selection_of(model: str, **budgets: float) -> Selection:
    return convert(build_model(model), S2FTConfig(budgets=budgets))


def test_a_selection_is_a_panel_a_kind_with_as_many_cells_as_are_trained(tmp_path: Path) -> None:
    selection = selection_of("llama", o=0.25, v=0.5, down=0.1)
    draw_selection(selection, tmp_path / "selection.png", "acme.bot")
    pixels = torch.tensor(imread(tmp_path / "selection.png"))
    assert pixels.shape[0] > 300
    assert (pixels[..., 2] - pixels[..., 0] > 0.3).sum() > 1000  # blue: some cells are filled
    heads = _selected_shares(selection, "heads")
    assert heads.shape == (8, 2)
    assert [sorted(heads[:, layer].nonzero()[0]) for layer in (0, 1)] == [
        selection.heads[0],
        selection.heads[1],
    ]
    channels = _selected_shares(selection, "channels")  # 88 channels in 64 rows
    assert channels.shape == (64, 2)
    assert float(channels.max()) <= 1.0
    assert 0.05 < channels.mean() < 0.15  # a tenth, but rows of two channels count like rows of one


@pytest.mark.parametrize("fault", ["no room for figures", "a damaged note"])
def test_what_cant_be_drawn_is_logged_and_left_out(
    fault: str, base_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    selection = selection_of("llama", down=0.1)
    note = "{" if fault == "a damaged note" else json.dumps(selection.to_json())
    (tmp_path / "selection.json").write_text(note)
    if fault == "no room for figures":
        (tmp_path / "figures").write_text("no folder")
    document = {"tenant": "acme", "name": "bot", "data": {"train": "rows.jsonl"}}
    config = parse_config({**document, "model": {"name_or_path": str(base_folder)}})
    journal = Journal(tmp_path / "tracking.json")
    tracked = TrackedRun(config, tmp_path, journal, None)  # type: ignore[arg-type]
    tracked.record_adapter(adapter_of(down=part("in", [0], [[0.3], [0.0]])))
    assert "the selection can't be drawn" in caplog.text
    assert ("the deltas can't be measured" in caplog.text) == (fault == "no room for figures")
    first = journal.next_entry()
    assert first == Entry("artifact", {"path": "selection.json", "folder": ""})


def test_layers_without_a_selection_and_experts_can_be_drawn(tmp_path: Path) -> None:
    selection = selection_of("qwen2_moe", o=0.0625, down=0.2, v=0.5)
    draw_selection(selection, tmp_path / "experts.png", "acme.bot")
    experts = _selected_shares(selection, "expert_channels")
    assert not experts[:, 0].any()  # layer 0 is dense
    assert experts[:, 1].mean() == pytest.approx(5 / 24)  # of each expert five of 24 channels
    back = Selection.from_json(json.loads(json.dumps(selection.to_json())))
    assert back == selection
