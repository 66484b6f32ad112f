"""export, fuse and inspect, as typed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from s2ft_ray import cli
from s2ft_ray.bases import load_base_model, load_tokenizer
from s2ft_ray.config import ModelConfig
from s2ft_ray.method import (
    Adapter,
    AdapterSlice,
    BaseInfo,
    S2FTConfig,
    convert,
    extract_adapter,
    fuse,
    restore,
    slice_layers,
)

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
IDS = torch.arange(3, 30).view(1, -1)


def run(*argv: object) -> int:
    return cli.main([str(part) for part in argv])


def train_adapter(base: Any, seed: int, **config: Any) -> Adapter:
    convert(base, S2FTConfig(seed=seed, **config))
    generator = torch.Generator().manual_seed(seed)
    for _, layer in slice_layers(base):
        layer.slice.data += 0.05 * torch.randn(layer.slice.shape, generator=generator)
    adapter = extract_adapter(base)
    restore(base)
    adapter.training["data"] = {"chat_template": TEMPLATE}
    return adapter


@pytest.fixture(scope="module")
def base() -> Any:
    return load_base_model(ModelConfig())


@pytest.fixture
def adapter(base: Any, tmp_path: Path) -> Adapter:
    adapter = train_adapter(base, 0, budgets={"o": 0.25, "down": 0.05})
    adapter.save(tmp_path / "adapter")
    return adapter


def switched_logits(base: Any, adapter: Adapter) -> torch.Tensor:
    adapter.switch_into(base)
    with torch.no_grad():
        logits: torch.Tensor = base(IDS).logits
    adapter.switch_out(base)
    return logits


def test_export_as_lora_is_loaded_by_peft(base: Any, adapter: Adapter, tmp_path: Path) -> None:
    out = tmp_path / "lora"
    assert run("export", tmp_path / "adapter", "--format", "peft", "--out", out) == 0
    expected = switched_logits(base, adapter)
    with torch.no_grad():
        found = PeftModel.from_pretrained(load_base_model(ModelConfig()), out)(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_export_with_one_rank_has_no_pattern(adapter: Adapter, tmp_path: Path) -> None:
    assert adapter
    argv = ("export", tmp_path / "adapter", "--format", "peft", "--uniform-rank")
    assert run(*argv, "--out", tmp_path / "lora") == 0
    document = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert document["rank_pattern"] == {}


def test_a_merged_export_is_a_whole_model_with_the_template_of_its_training(
    base: Any, adapter: Adapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    assert run("export", tmp_path / "adapter", "--format", "merged", "--out", out) == 0
    assert "s2ft://tiny with " in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        assert torch.equal(merged(IDS).logits, switched_logits(base, adapter))
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.get_vocab() == load_tokenizer(ModelConfig()).get_vocab()


def test_a_base_that_has_moved_is_named_and_merged_from_its_files(
    base: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "elsewhere"
    base.save_pretrained(moved)
    trained = train_adapter(base, 0)
    gone = BaseInfo(str(tmp_path / "gone"), None, trained.base.fingerprint)
    Adapter(trained.slices, gone, trained.config).save(tmp_path / "adapter")
    argv = ("export", tmp_path / "adapter", "--format", "merged", "--out", tmp_path / "merged")
    assert run(*argv) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "gone") in error
    assert "named with --base" in error
    assert not (tmp_path / "merged").exists()
    assert run(*argv, "--base", moved) == 0
    assert "loading the model" not in capsys.readouterr().err
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert torch.equal(merged(IDS).logits, switched_logits(base, trained))


def test_fuse_writes_the_weighted_sum(
    base: Any, adapter: Adapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = train_adapter(base, 1, budgets={"down": 0.05})
    other.save(tmp_path / "other")
    argv = ("fuse", tmp_path / "adapter", tmp_path / "other", "--weights", "1", "-0.5")
    assert run(*argv, "--out", tmp_path / "fused") == 0
    fused = Adapter.load(tmp_path / "fused")
    assert fused.fingerprint == fuse([adapter, other], [1.0, -0.5]).fingerprint
    printed = capsys.readouterr().out
    assert f"-0.5 x {tmp_path / 'other'}" in printed
    assert fused.fingerprint[:12] in printed


def test_export_and_fuse_tell_a_program_what_they_wrote(
    adapter: Adapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here, name = tmp_path / "adapter", "s2ft://tiny"
    for form, more in (("peft", {"rank": adapter_rank(adapter)}), ("merged", {})):
        out = tmp_path / form
        assert run("export", here, "--format", form, "--out", out, "--json") == 0
        facts = json.loads(capsys.readouterr().out)
        identity = {"folder": str(out), "fingerprint": adapter.fingerprint}
        assert facts == {"format": form, "base": name, **identity, **more}
    assert run("fuse", here, "--weights", "2", "--out", tmp_path / "fused", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["fingerprint"] == Adapter.load(tmp_path / "fused").fingerprint
    part = {"adapter": str(here), "fingerprint": adapter.fingerprint, "weight": 2.0}
    assert facts["parts"] == [part]


def adapter_rank(adapter: Adapter) -> int:
    return max(len(part.indices) for part in adapter.slices.values())


def test_inspect_tells_what_changes_where_and_of_which_base(
    adapter: Adapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("inspect", tmp_path / "adapter", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["fingerprint"] == adapter.fingerprint
    assert facts["base"]["name"] == "s2ft://tiny"
    assert facts["num_parameters"] == adapter.num_parameters
    assert [module["module"] for module in facts["modules"]] == list(adapter.slices)
    for module in facts["modules"]:
        part = adapter.slices[module["module"]]
        assert module["indices"] == part.indices.tolist()
        assert module["norm"] == pytest.approx(float(part.delta.norm()))
        assert 0 < module["relative_norm"] < 10
    assert run("inspect", tmp_path / "adapter") == 0
    table = capsys.readouterr().out
    for name, part in adapter.slices.items():
        (row,) = (line for line in table.splitlines() if line.startswith(name))
        assert f"{len(part.indices)} columns" in row
        assert "%" in row
    assert "s2ft://tiny" in table


def test_inspect_of_an_adapter_whose_base_isnt_here_leaves_the_ratio_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = AdapterSlice(
        "out", torch.tensor([0, 1, 2, 5, 7, 9], dtype=torch.int32), torch.ones(6, 4)
    )
    for name in ("/nowhere/base", "s2ft://tiny", None):
        Adapter({"m": part}, BaseInfo(name, None, "0" * 64), S2FTConfig()).save(tmp_path / "a")
        assert run("inspect", tmp_path / "a") == 0
        printed = capsys.readouterr().out
        assert "RELATIVE is missing" in printed
        assert "0-2 5 7 and 1 more" in printed


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("inspect", "no-such"), "'no-such' names no registered adapter"),
        (("inspect", "no-such", "--json"), "'no-such' names no registered adapter"),
        (("fuse", "{a}", "--weights", "nan", "--out", "{here}/f", "--json"), "finite numbers"),
        (("inspect", "{here}"), "holds no adapter_config.json"),
        (("export", "{a}", "--format", "peft", "--out", "{a}"), "exists and is not empty"),
        (("fuse", "{a}", "--out", "{a}"), "exists and is not empty"),
        (("fuse", "{a}", "--weights", "1", "2", "--out", "{here}/f"), "not 1 finite numbers"),
        (
            ("export", "{a}", "--format", "peft", "--base", "x", "--out", "{here}/f"),
            "--base is for --format merged",
        ),
        (
            ("export", "{a}", "--format", "merged", "--uniform-rank", "--out", "{here}/f"),
            "--uniform-rank is for --format peft",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    argv: tuple[str, ...],
    message: str,
    adapter: Adapter,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert adapter
    places = {"a": tmp_path / "adapter", "here": tmp_path}
    assert run(*(part.format(**places) for part in argv)) == 2
    printed = capsys.readouterr()
    assert not printed.out  # nothing that a program could take for an answer
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "f").exists()


def test_another_base_under_the_adapters_name_is_refused(
    adapter: Adapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert adapter
    other = load_base_model(ModelConfig())
    with torch.no_grad():
        other.model.norm.weight += 1
    other.save_pretrained(tmp_path / "other")
    argv = ("export", tmp_path / "adapter", "--format", "merged", "--out", tmp_path / "merged")
    assert run(*argv, "--base", tmp_path / "other") == 2
    assert "the base differs" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
