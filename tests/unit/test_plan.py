"""The memory estimate against what the graph really keeps, and a 70B plan on paper."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

from s2ft_ray.bases import load_tokenizer
from s2ft_ray.config import ModelConfig, parse_config
from s2ft_ray.errors import ConfigError, RegistryUnreachable
from s2ft_ray.method import convert
from s2ft_ray.training.memory import estimate_memory, measure_base
from s2ft_ray.training.parallel import Layout
from s2ft_ray.training.plan import plan_run

VOCAB, TOKENS = 64, 512


def bytes_kept(model: LlamaForCausalLM) -> int:
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    seen: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(0, VOCAB, (4, TOKENS // 4))
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = model(input_ids=ids, use_cache=False).logits.float().square().sum()
    assert loss.requires_grad
    return sum(seen.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 8])
def test_the_estimate_is_what_the_graph_keeps(
    dtype: str, checkpointing: bool, kv_heads: int
) -> None:
    torch.manual_seed(0)
    sizes = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=kv_heads,
        dtype=dtype,
    )
    config = parse_config(
        {
            "tenant": "acme",
            "name": "bot",
            "data": {"train": "rows.jsonl"},
            "model": {"dtype": dtype},
            "optim": {"micro_batch_size": 4},
            "parallel": {"activation_checkpointing": checkpointing},
        }
    )
    model = LlamaForCausalLM(sizes).to(getattr(torch, dtype)).train()
    selection = convert(model, config.method)
    if checkpointing:
        model.activation_checkpointing_enable()
    estimate = estimate_memory(
        config,
        sizes,
        measure_base(config, sizes),
        selection.num_trainable,
        TOKENS // 4,
        Layout.of("replicate", 1, 1),
    )
    kept = bytes_kept(model)
    if checkpointing:  # the estimate has one layer's recomputed part, which is no more than rest
        assert kept < estimate.activations < 4 * kept
    else:
        assert estimate.activations == pytest.approx(kept, rel=0.12)
    width = getattr(torch, dtype).itemsize
    assert estimate.base == width * sum(
        p.numel() for name, p in model.named_parameters() if not name.endswith(".slice")
    )
    # Slices, gradients and moments; whole on each worker slices, gradients and the base's values.
    assert estimate.slices == (16 + 8 + width) * selection.num_trainable


def test_a_pair_of_preferences_is_two_sequences_and_holds_the_first_slices() -> None:
    sizes = LlamaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2)
    layout, trained = Layout.of("full", 4, 1), 1_000
    made = {}
    for loss, rows in (("cross_entropy", 4), ("dpo", 2)):
        config = parse_config(
            {
                "tenant": "acme",
                "name": "bot",
                "data": {"train": "rows.jsonl"},
                "objective": {"loss": loss},
                "optim": {"global_batch_size": 4 * rows, "micro_batch_size": rows},
            }
        )
        base = measure_base(config, sizes)
        made[loss] = estimate_memory(config, sizes, base, trained, TOKENS, layout)
    plain, dpo = made["cross_entropy"], made["dpo"]
    assert dpo.activations == plain.activations
    assert dpo.slices - plain.slices == 4 * trained / 4


def test_a_70b_run_is_planned_on_paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S2FT_HOME", str(tmp_path))
    sizes = LlamaConfig(
        vocab_size=128_256,
        hidden_size=8_192,
        intermediate_size=28_672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        dtype="bfloat16",
    )
    sizes.architectures = ["LlamaForCausalLM"]
    sizes.save_pretrained(tmp_path / "base")  # a configuration and a tokenizer; no weights
    load_tokenizer(ModelConfig()).save_pretrained(tmp_path / "base")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "a", "completion": "b " * 500}) + "\n" + "{}\n")
    config = parse_config(
        {
            "tenant": "acme",
            "name": "big",
            "model": {"name_or_path": str(tmp_path / "base")},
            "data": {"train": str(rows), "eval": str(rows), "invalid_rows": "drop"},
            "optim": {"global_batch_size": 16, "micro_batch_size": 1, "max_steps": 10},
            "parallel": {
                "num_workers": 16,
                "sharding": "hybrid",
                "shard_group": 8,
                "activation_checkpointing": True,
            },
        }
    )
    plan = plan_run(config)
    assert plan.num_parameters == 70_553_706_496
    (cost,) = plan.costs
    assert cost.memory.base == pytest.approx(141e9 / 8, rel=0.01)
    assert cost.memory.gathered == pytest.approx(3 * 2 * 855e6 + 2 * 2 * 128_256 * 8_192, rel=0.01)
    # One micro-batch a worker: the base and the slices twice, of which 7/8 come from others.
    slices = 4 * plan.num_trainable
    assert cost.traffic.gathered == pytest.approx(2 * (141.1e9 + slices) * 7 / 8, rel=0.01)
    text = plan.describe()
    print(text)  # for the documentation
    assert "MiB on each of 16 worker(s) in hybrid in groups of 8:" in text
    assert f"checkpoint  {12 * plan.num_trainable / 2**20:,.1f} MiB" in text


def test_an_elastic_hybrid_run_is_planned_at_its_smallest_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("S2FT_HOME", str(tmp_path))
    rows = tmp_path / "rows.jsonl"
    rows.write_text((json.dumps({"prompt": "Number 1 is", "completion": " odd"}) + "\n") * 40)
    document = {
        "tenant": "acme",
        "name": "elastic",
        "data": {"train": str(rows)},
        "parallel": {"num_workers": [1, 4], "sharding": "hybrid", "shard_group": 4},
    }
    (cost,) = plan_run(parse_config(document)).costs
    assert cost.layout == Layout("hybrid", 1, 1)
    assert cost.traffic.total == 0


def test_an_mlflow_that_is_away_is_no_fault_of_a_run_with_a_registered_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("S2FT_HOME", str(tmp_path))
    document = {
        "tenant": "acme",
        "name": "child",
        "data": {"train": str(tmp_path / "rows.jsonl")},
        "registry": {"parent": "acme.bot"},
        "tracking": {"uri": "http://127.0.0.1:1"},
    }
    with pytest.raises(RegistryUnreachable, match=r"acme\.bot: can't be looked up: MLflow at"):
        plan_run(parse_config(document))


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    """A base with 64 positions: its configuration and a tokenizer, no weights."""
    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(tmp_path / "gpt2")
    load_tokenizer(ModelConfig()).save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


@pytest.mark.parametrize(
    ("words", "held_out_words", "data", "longest"),
    [
        (5, 5, {"max_seq_len": 512}, None),
        (100, 5, {"max_seq_len": 64}, None),
        (100, 5, {"max_seq_len": 65}, 65),
        (5, 100, {"max_seq_len": 65}, 65),
        (5, 5, {"max_seq_len": 80, "packing": True}, 80),
        (5, 5, {"max_seq_len": 64, "packing": True}, None),
    ],
)
def test_rows_beyond_the_positions_that_a_base_has_learned_are_refused(
    gpt2: Path,
    words: int,
    held_out_words: int,
    data: dict[str, Any],
    longest: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("S2FT_HOME", str(gpt2.parent))
    names = {}
    for key, count in (("train", words), ("eval", held_out_words)):
        names[key] = str(gpt2.parent / f"{key}.jsonl")
        row = {"prompt": "Number 1 is", "completion": " odd" * count}
        Path(names[key]).write_text((json.dumps(row) + "\n") * 40)
    document = {
        "tenant": "acme",
        "name": "bot",
        "model": {"name_or_path": str(gpt2)},
        "data": {**names, **data},
    }
    if longest is None:
        plan_run(parse_config(document))
        return
    with pytest.raises(ConfigError) as caught:
        plan_run(parse_config(document))
    assert str(caught.value) == (
        f"data.max_seq_len {longest}: rows are up to {longest} tokens long, and {gpt2} has"
        " embeddings for 64 positions; take at most 64"
    )


def test_packing_is_told_with_how_full_the_sequences_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("S2FT_HOME", str(tmp_path))
    rows = tmp_path / "rows.jsonl"
    row = json.dumps({"prompt": "Number 1 is", "completion": " odd"}) + "\n"
    rows.write_text(row * 41)  # two of them are held out
    document = {
        "tenant": "acme",
        "name": "packed",
        "data": {"train": [{"path": str(rows), "weight": 2}], "packing": True, "max_seq_len": 64},
    }
    plan = plan_run(parse_config(document))
    each = plan.data.report.tokens // 39
    whole = 64 // each  # rows in a sequence
    sequences = -(-39 // whole)
    assert plan.packed_share == pytest.approx(39 * each / (sequences * 64))
    told = f"39 rows in {2 * sequences} sequences of 64 tokens, {plan.packed_share:.1%} of them"
    assert told in plan.describe()
    alone = plan_run(parse_config({**document, "data": {"train": str(rows)}}))
    assert alone.packed_share is None
