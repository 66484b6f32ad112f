"""The forgetting benchmark on a random base: what is measured, trained alike, and done once."""

import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from method_models import VOCABULARY, assert_same_state, build_model, snapshot

from s2ft_ray.data.batches import Sample, build_micro_batch

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tasks() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPO / "jobs")
        from benchmarks import forgetting, forgetting_tasks  # noqa: F401  # both need the path

        return forgetting_tasks


@pytest.fixture(scope="module")
def forgetting(tasks: ModuleType) -> ModuleType:  # noqa: ARG001  # it finds the path
    from benchmarks import forgetting

    return forgetting


def build_task(tasks: ModuleType, seed: int = 0) -> Any:
    """Rows that count up from a number: a random base doesn't know them."""
    rows = [
        Sample([(first + i) % VOCABULARY for i in range(8)], [True] * 8, first)
        for first in range(VOCABULARY)
    ]
    generator = torch.Generator().manual_seed(seed)
    spoken = torch.randint(0, VOCABULARY, (4, 6), generator=generator).tolist()
    samples = [[Sample(ids, [False] * 2 + [True] * 4, i)] for i, ids in enumerate(spoken)]
    test = build_micro_batch([[row] for row in rows[:5]], pad_id=0)
    return tasks.Task(
        "tiny",
        build_model(),
        SimpleNamespace(pad_token_id=0),
        rows[5:],
        test,
        build_micro_batch(samples, pad_id=0),
    )


@pytest.fixture(scope="module")
def task(tasks: ModuleType) -> Any:
    return build_task(tasks)


def test_kl_is_the_bases_divergence_of_the_tokens_after_its_prompts(task: Any) -> None:
    loss, kl = task.measure(task.model)
    assert kl == pytest.approx(0, abs=1e-6)
    other = build_model(seed=1)
    with torch.no_grad():
        logits = task.model(input_ids=task.test.input_ids).logits[:, :-1]
        chances = [
            model(input_ids=task.samples.input_ids).logits.double().softmax(-1)
            for model in (task.model, other)
        ]
    targets = task.test.input_ids[:, 1:]
    rows = logits.double().log_softmax(-1).gather(-1, targets.unsqueeze(-1))
    assert loss == pytest.approx(-float(rows.mean()), rel=1e-5)
    base, tuned = (it[:, 1:-1] for it in chances)  # what predicts the tokens 2 to 5 of 6
    expected = (base * (base / tuned).log()).sum(-1).mean()
    assert task.measure(other)[1] == pytest.approx(float(expected), rel=1e-4)


def count_trained(tasks: ModuleType, method: str) -> int:
    model = tasks._attach(method, build_model(), seed=0)
    return sum(it.numel() for it in model.parameters() if it.requires_grad)


def test_s2ft_and_lora_train_as_many_parameters(tasks: ModuleType, task: Any) -> None:
    budget = tasks.count_budget(task)
    assert count_trained(tasks, tasks.S2FT) == budget
    for method, targets in tasks.LORA_TARGETS.items():
        linears = [
            layer
            for name, layer in task.model.named_modules()
            if name.rpartition(".")[2] in targets
        ]
        per_rank = sum(it.in_features + it.out_features for it in linears)
        trained = count_trained(tasks, method)
        assert trained % per_rank == 0
        assert abs(trained - budget) <= per_rank / 2
    assert count_trained(tasks, tasks.FULL) == task.model.num_parameters()


@pytest.mark.parametrize("method", ["S2FT", "LORA", "NARROW_LORA", "FULL"])
def test_a_copy_learns_the_task_and_the_base_stays(
    tasks: ModuleType, task: Any, method: str
) -> None:
    before, start = snapshot(task.model), task.measure(task.model)[0]
    name = getattr(tasks, method)
    points = list(tasks.teach(task, name, 3e-3, seed=0, measured=(2, 12)))
    assert [step for step, _, _ in points] == [2, 12]
    assert start > points[0][1] > points[1][1]
    assert 0 < points[0][2] < points[1][2]
    assert_same_state(task.model, before)
    assert points == list(tasks.teach(task, name, 3e-3, seed=0, measured=(2, 12)))


def test_a_tasks_digest_is_its_bases_its_rows_and_its_samples(tasks: ModuleType, task: Any) -> None:
    assert build_task(tasks).digest == task.digest
    others = [build_task(tasks) for _ in range(3)]
    others[0].model = build_model(seed=1)
    others[1].train = others[1].train[1:]
    others[2].samples = build_task(tasks, seed=1).samples
    assert len({task.digest, *(it.digest for it in others)}) == 4


@pytest.fixture
def taught(forgetting: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The runs that are done, of two methods with a learning rate each."""
    done: list[tuple[str, int]] = []

    def teach(_task: Any, method: str, _lr: float, seed: int, measured: tuple[int, ...]) -> Any:
        done.append((method, seed))
        return [(step, 1.0 / step, 0.1) for step in measured]

    monkeypatch.setattr(forgetting, "teach", teach)
    monkeypatch.setattr(forgetting, "LRS", {"a": (1e-3,), "b": (1e-3,)})
    return done


def test_a_finished_run_is_not_done_again_but_a_torn_one_is(
    forgetting: ModuleType, task: Any, taught: list[tuple[str, int]], tmp_path: Path
) -> None:
    path = tmp_path / "runs.jsonl"
    first = forgetting.complete(task, path, [0], 8)
    assert taught == [("a", 0), ("b", 0)]
    path.write_text(path.read_text()[:-9])
    assert forgetting.complete(task, path, [0, 1], 8)[:2] == first
    assert taught[2:] == [("b", 0), ("a", 1), ("b", 1)]
    assert [json.loads(line)["seed"] for line in path.read_text().splitlines()] == [0, 0, 1, 1]
    forgetting.complete(task, path, [0, 1], 8)
    assert len(taught) == 5


@pytest.mark.parametrize("stale", ["budgets", "digest", "steps", "old file"])
def test_a_run_of_another_budget_or_task_does_not_count(
    forgetting: ModuleType,
    task: Any,
    taught: list[Any],
    tmp_path: Path,
    stale: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "runs.jsonl"
    forgetting.complete(task, path, [0], 8)
    steps = 8
    if stale == "budgets":
        monkeypatch.setattr(forgetting, "BUDGETS", {"o": 0.5})
    elif stale == "digest":
        task = SimpleNamespace(name=task.name, digest="another")
    elif stale == "steps":
        steps = 16
    else:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            del line["budgets"], line["digest"]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = forgetting.complete(task, path, [0], steps)
    assert len(taught) == 4
    assert all((it.digest, it.steps) == (task.digest, steps) for it in results)
    forgetting.complete(task, path, [0], steps)
    assert len(taught) == 4
