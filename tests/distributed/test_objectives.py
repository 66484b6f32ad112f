"""Preferences, smoothing, noise and weights on gloo processes: the numbers they promise."""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
import torch.nn.functional as F
from gloo import GlooPool
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig

from s2ft_ray.bases import load_base_model
from s2ft_ray.config import ModelConfig, OptimConfig, S2FTConfig
from s2ft_ray.data import MicroBatch, Step
from s2ft_ray.errors import Preempted
from s2ft_ray.method import Adapter, convert
from s2ft_ray.training import worker
from s2ft_ray.training.loop import train_step
from s2ft_ray.training.objective import CrossEntropy, EmbeddingNoise, Preference
from s2ft_ray.training.optimizer import build_optimizer
from s2ft_ray.training.parallel import Layout, Workers, shard_model
from s2ft_ray.training.run_folder import RunFolder

JOBS = Path(__file__).parents[2] / "jobs"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.save_base(tmp_path_factory.mktemp("base"))


def write_pairs(path: Path, count: int) -> str:
    """Write preferences: an answer that is sure of itself to one that is not."""
    rows = (
        {"prompt": f"Number {n} is", "chosen": f" {n}, surely", "rejected": f" {n}, perhaps"}
        for n in range(count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make_run(folder: Path, base: Path, **sections: dict[str, Any]) -> RunFolder:
    folder.mkdir(parents=True, exist_ok=True)
    data = {"train": write_pairs(folder / "pairs.jsonl", 60), "format": "preference"}
    return runs.make_run(folder, base, **{"objective": {"loss": "dpo"}, "data": data, **sections})


def losses(run: RunFolder) -> list[float]:
    return [line["loss"] for line in runs.read_metrics(run, "train")]


def largest_difference(left: RunFolder, right: RunFolder) -> float:
    ours, theirs = Adapter.load(left.adapter).slices, Adapter.load(right.adapter).slices
    return max(float((p.delta - theirs[name].delta).abs().max()) for name, p in ours.items())


def stop_at_third_step(path: Path) -> None:
    real = worker.train_step

    def step(*args: Any, number: int, **rest: Any) -> Any:
        if number == 2:
            RunFolder(path).request_stop("test")
        return real(*args, number=number, **rest)

    worker.train_step = step
    try:
        with pytest.raises(Preempted):
            runs.train(path)
    finally:
        worker.train_step = real


def test_preferences_train_alike_in_every_layout_and_after_a_stop(
    one: GlooPool, two: GlooPool, tmp_path: Path, base: Path
) -> None:
    made = {}
    for pool, mode in ((one, "replicate"), (two, "replicate"), (two, "full")):
        name = f"{mode}{pool.world_size}"
        made[name] = make_run(tmp_path / name, base, parallel={"sharding": mode})
        pool.run(runs.train, made[name].path)
    first = losses(made["replicate2"])
    assert first[0] == pytest.approx(math.log(2), abs=1e-6)  # the start is its own reference
    assert first[-1] < first[0] - 0.01
    assert losses(made["replicate1"]) == pytest.approx(first, abs=1e-5)
    wanted = Adapter.load(made["replicate2"].adapter).fingerprint
    assert Adapter.load(made["full2"].adapter).fingerprint == wanted
    cut = make_run(tmp_path / "cut", base)
    two.run(stop_at_third_step, cut.path)
    cut.clear_stop()
    two.run(runs.train, cut.path)
    assert Adapter.load(cut.adapter).fingerprint == wanted


def test_dpo_is_the_papers_formula_with_a_second_model(
    one: GlooPool, tmp_path: Path, base: Path
) -> None:
    run = make_run(tmp_path, base, optim={"max_steps": 2, "lr": 1e-2, "schedule": "constant"})
    one.run(runs.train, run.path)
    # The second step's loss, by a model with the first step's adapter and a plain one.
    short = make_run(
        tmp_path / "short", base, optim={"max_steps": 1, "lr": 1e-2, "schedule": "constant"}
    )
    one.run(runs.train, short.path)
    config = run.load_config()
    policy, reference = load_base_model(config.model), load_base_model(config.model)
    Adapter.load(short.adapter).switch_into(policy)
    loader = worker.TrainLoader(
        worker.PreparedData.load(run.data).train,
        global_batch_size=8, micro_batch_size=8, rank=0, world_size=1, seed=0, pad_id=0,
    )  # fmt: skip
    loader.next_step()
    (batch,) = loader.next_step().micro_batches
    assert batch is not None

    def gain(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            logp = model(input_ids=batch.input_ids).logits[:, :-1].log_softmax(-1)
        picked = logp.gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1)
        return (picked * (batch.labels[:, 1:] != -100)).sum(1)

    gains = (gain(policy) - gain(reference)).view(-1, 2)
    expected = -F.logsigmoid(0.1 * (gains[:, 0] - gains[:, 1])).mean()
    assert losses(run)[1] == pytest.approx(float(expected), abs=1e-6)


def measure_peak(loss: str, sharding: str) -> dict[str, int]:
    """Return the most bytes in tensors over two steps of `loss`, and what the model has of them."""
    sys.path.insert(0, str(JOBS))
    from benchmarks.allocations import Allocations

    torch.manual_seed(0)
    workers = Workers.join(torch.device("cpu"))
    sizes = {"hidden_size": 256, "intermediate_size": 704, "vocab_size": 512}
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=8, **sizes)
    )
    convert(model, S2FTConfig(budgets={"o": 0.25, "down": 0.1}))
    layout = Layout.of(sharding, workers.world_size, 1)  # type: ignore[arg-type]
    shard_model(model, workers, layout)
    slices = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config = OptimConfig(max_steps=2, global_batch_size=4, micro_batch_size=4)
    optimizer = build_optimizer(slices, config)
    ids = torch.randint(0, 512, (4, 32), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(32).expand(4, 32)
    batch = MicroBatch(ids, ids, positions, num_targets=124, num_tokens=128)
    step = Step([batch], num_targets=124, normalizer=2.0, lines=[], files=[])
    with Allocations() as allocations:
        objective = Preference(model, 0.1) if loss == "dpo" else CrossEntropy()
        for number in range(2):
            train_step(
                model, optimizer, step, number=number, num_steps=2, config=config,
                workers=workers, objective=objective,
            )  # fmt: skip
    return {
        "peak": allocations.peak,
        "slices": 4 * sum(p.to_local().numel() for p in slices),  # type: ignore[operator]
        "model": 4 * sum(p.numel() for p in model.parameters() if not p.requires_grad),
    }


def test_preferences_take_the_slices_once_more_and_no_second_model(one: GlooPool) -> None:
    plain, dpo = (one.run(measure_peak, it, "replicate")[0] for it in ("cross_entropy", "dpo"))
    assert dpo["model"] > 25 * dpo["slices"]
    # Gloo lets go of what it has sent sooner or later: the slices, gathered, up to twice a run.
    assert abs(dpo["peak"] - plain["peak"] - dpo["slices"]) < 4 * dpo["slices"]


def test_nor_a_second_shard_of_it(two: GlooPool) -> None:
    plain, dpo = (two.run(measure_peak, it, "full")[0] for it in ("cross_entropy", "dpo"))
    # Here gathered layers, of which each has a quarter of the model.
    assert abs(dpo["peak"] - plain["peak"]) < 0.7 * dpo["model"] / 2


def test_dropout_does_not_part_the_start_from_itself(one: GlooPool, tmp_path: Path) -> None:
    base = runs.save_base(tmp_path / "base", attention_dropout=0.5)
    run = make_run(tmp_path / "run", base, optim={"max_steps": 1})
    one.run(runs.train, run.path)
    assert losses(run)[0] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("kind", [OPTConfig, GPT2Config])
def test_every_way_in_which_models_keep_dropout_is_switched_off(kind: type) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    sizes |= {"ffn_dim": 64, "word_embed_proj_dim": 32, "bos_token_id": 0, "eos_token_id": 1}
    rates = {"dropout": 0.5, "attention_dropout": 0.5, "attn_pdrop": 0.5, "resid_pdrop": 0.5}
    model = AutoModelForCausalLM.from_config(kind(**sizes, **rates)).train()
    ids = torch.arange(2, 22).unsqueeze(0)
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    Preference(model, 0.1)
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_the_embedded_base_learns_to_prefer(two: GlooPool, tmp_path: Path) -> None:
    run = make_run(
        tmp_path,
        Path("s2ft://tiny"),
        model={"name_or_path": "s2ft://tiny"},
        method={"budgets": {"o": 0.25, "down": 0.1}},
        optim={"lr": 5e-3, "max_steps": 24, "global_batch_size": 8, "micro_batch_size": 4},
        evaluation={"every_steps": 12, "num_samples": 0},
    )
    two.run(runs.train, run.path)
    evaluations = runs.read_metrics(run, "eval")
    assert evaluations[0]["token_accuracy"] == 0.0  # nothing has gained on anything
    assert evaluations[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert evaluations[-1]["token_accuracy"] >= 0.9
    assert evaluations[-1]["loss"] < 0.5


def test_noise_and_smoothing_are_the_same_on_any_world_size(
    one: GlooPool, two: GlooPool, tmp_path: Path, base: Path
) -> None:
    made = {}
    for name, pool, objective in (
        ("plain", two, {}),
        ("one", one, {"neftune_alpha": 5.0, "label_smoothing": 0.1}),
        ("two", two, {"neftune_alpha": 5.0, "label_smoothing": 0.1}),
    ):
        made[name] = runs.make_run(tmp_path / name, base, objective=objective)
        pool.run(runs.train, made[name].path)
    assert losses(made["one"]) == pytest.approx(losses(made["two"]), abs=1e-5)
    assert largest_difference(made["one"], made["two"]) < 1e-5
    assert largest_difference(made["plain"], made["two"]) > 1e-3
    # Held-out rows are scored without either.
    first = [runs.read_metrics(run, "eval")[0]["loss"] for run in made.values()]
    assert first == pytest.approx([first[0]] * 3, abs=1e-6)


def test_a_row_of_weight_two_counts_as_two_rows(base: Path) -> None:
    model = load_base_model(ModelConfig(name_or_path=str(base)))
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :4] = -100
    positions = torch.arange(9).expand(2, 9)
    plain = MicroBatch(ids, labels, positions, num_targets=10, num_tokens=18)
    weights = torch.tensor([[2.0], [1.0]]).expand(2, 9)
    weighted = dataclasses.replace(plain, weights=weights)
    objective = CrossEntropy(label_smoothing=0.1)
    rows = [
        dataclasses.replace(
            plain,
            input_ids=ids[row : row + 1],
            labels=labels[row : row + 1],
            position_ids=positions[row : row + 1],
        )
        for row in range(2)
    ]
    one, other = (objective.loss(model, row)[0] for row in rows)
    torch.testing.assert_close(objective.loss(model, plain)[0], one + other)
    torch.testing.assert_close(objective.loss(model, weighted)[0], 2 * one + other)


def test_smoothing_gives_a_share_of_the_target_to_every_token(base: Path) -> None:
    model = load_base_model(ModelConfig(name_or_path=str(base)))
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(9).expand(2, 9)
    batch = MicroBatch(ids, ids, positions, num_targets=16, num_tokens=18)
    with torch.no_grad():
        logp = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    hit = logp.gather(-1, ids[:, 1:, None]).sum()
    expected = -(0.9 * hit + 0.1 * logp.mean(-1).sum())
    torch.testing.assert_close(CrossEntropy(label_smoothing=0.1).loss(model, batch)[0], expected)


def test_noise_is_uniform_up_to_alpha_over_the_root_of_length_times_width(base: Path) -> None:
    model = load_base_model(ModelConfig(name_or_path=str(base)))
    ids = torch.randint(3, 100, (4, 50), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(50).expand(4, 50)
    batch = MicroBatch(ids, ids, positions, num_targets=196, num_tokens=200)
    embed = model.get_input_embeddings()
    plain = embed(ids).detach()
    noise = EmbeddingNoise(model, alpha=5.0, seed=0)
    noise.begin(batch)
    most = 5.0 / (50 * plain.shape[-1]) ** 0.5
    found = (embed.train()(ids) - plain).detach() / most
    assert found.abs().max() <= 1 + 1e-5
    assert float(found.std()) == pytest.approx(3**-0.5, rel=0.05)  # of a uniform one on [-1, 1]
    assert abs(float(found.mean())) < 0.05
    assert torch.equal(embed.eval()(ids), plain)
