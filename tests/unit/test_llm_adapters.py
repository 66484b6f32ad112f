"""The test sets of LLM-Adapters: prompts to the space, answers found as its evaluation does."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from s2ft_ray.errors import ConfigError, DataError

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def llm_adapters() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPO / "jobs")
        from evaluation import llm_adapters

        return llm_adapters


@pytest.fixture(scope="module")
def results_module(llm_adapters: ModuleType) -> ModuleType:  # noqa: ARG001  # it finds the path
    from evaluation import results

    return results


@pytest.mark.parametrize(
    ("task", "written", "found"),
    [
        ("gsm8k", "24 * 24 = 576 tiles. The answer is 576.", "576."),
        ("gsm8k", "It costs $1,234.50 in all", "1234.50"),
        ("AddSub", "from 3 to -2", "-2"),
        ("SVAMP", "no number", ""),
        ("MultiArith", "is 4.\n\n### Response: 5", "4."),
        ("AQuA", "The answer is C, not D", "C"),
        ("AQuA", "no letter of them", ""),
        ("boolq", "the correct answer is true, false", "true"),
        ("boolq", "True", ""),
        ("piqa", "the correct answer is solution2", "solution2"),
        ("social_i_qa", "answer3", "answer3"),
        ("hellaswag", "ending4 or ending1", "ending4"),
        ("winogrande", "option2", "option2"),
        ("winogrande", "option3", ""),
        ("ARC-Challenge", "the correct answer is answer5", "answer5"),
        ("openbookqa", "answer 1", ""),
    ],
)
def test_answer_is_what_the_original_finds(
    llm_adapters: ModuleType, task: str, written: str, found: str
) -> None:
    assert llm_adapters.TASKS[task].find_answer(written) == found


@pytest.mark.parametrize(
    ("task", "found", "answer", "right"),
    [
        ("gsm8k", "576.", "576.0", True),
        ("gsm8k", "576.001", "576", True),
        ("gsm8k", "576.002", "576", False),
        ("SVAMP", "", "8.0", False),
        ("AddSub", "-2", "2", False),
        ("AQuA", "C", "C", True),
        ("AQuA", "", "C", False),
        ("boolq", "true", "true", True),
        ("piqa", "solution1", "solution2", False),
    ],
)
def test_numbers_are_compared_within_a_thousandth_and_words_exactly(
    llm_adapters: ModuleType, task: str, found: str, answer: str, right: bool
) -> None:
    assert llm_adapters.TASKS[task].is_right(found, answer) is right


def test_suites_are_seven_and_eight_sets(llm_adapters: ModuleType) -> None:
    suites = [task.suite for task in llm_adapters.TASKS.values()]
    assert suites == ["arithmetic"] * 7 + ["commonsense"] * 8
    lengths = {task.suite: task.max_new_tokens for task in llm_adapters.TASKS.values()}
    assert lengths == {"arithmetic": 256, "commonsense": 32}


def test_prompt_has_the_spaces_of_the_original(llm_adapters: ModuleType) -> None:
    indent = " " * 16
    assert llm_adapters.render("1 + 1?") == (
        "Below is an instruction that describes a task. Write a response that appropriately"
        f" completes the request. \n\n{indent}### Instruction:\n{indent}1 + 1?\n\n"
        f"{indent}### Response:\n{indent}"
    )
    assert llm_adapters.render("Add.", "1, 1") == (
        "Below is an instruction that describes a task, paired with an input that provides further"
        " context. Write a response that appropriately completes the request.\n\n"
        f"{indent}### Instruction:\n{indent}Add.\n\n{indent}### Input:\n{indent}1, 1\n\n"
        f"{indent}### Response:\n{indent}"
    )


@pytest.mark.parametrize(
    ("path", "task"),
    [
        ("test_gsm8k.jsonl", "gsm8k"),
        ("math/test_addsub.jsonl", "AddSub"),
        ("dataset/SingleEq/test.json", "SingleEq"),
        ("dataset/ARC-Challenge/test.json", "ARC-Challenge"),
        ("siqa.json", "social_i_qa"),
        ("test_mawps.json", "mawps"),
    ],
)
def test_file_or_folder_tells_the_test_set(llm_adapters: ModuleType, path: str, task: str) -> None:
    assert llm_adapters.find_task(Path(path)).name == task


def test_unknown_test_set_is_refused_with_the_known(llm_adapters: ModuleType) -> None:
    with pytest.raises(ConfigError, match="known: MultiArith, gsm8k"):
        llm_adapters.find_task(Path("tickets_test.jsonl"))


def test_json_and_jsonl_give_the_same_rows(llm_adapters: ModuleType, tmp_path: Path) -> None:
    rows = [{"instruction": f"{i}?", "input": "", "output": "", "answer": i} for i in range(3)]
    folder = tmp_path / "AddSub"
    folder.mkdir()
    (folder / "test.json").write_text(json.dumps(rows, indent=2))
    (tmp_path / "test_addsub.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = llm_adapters.read_rows(folder / "test.json")
    assert found == llm_adapters.read_rows(tmp_path / "test_addsub.jsonl")
    assert [(row.number, row.answer) for row in found] == [(0, "0"), (1, "1"), (2, "2")]


def test_faulty_row_is_named_by_line(llm_adapters: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "test_svamp.jsonl"
    path.write_text('{"instruction": "a", "answer": "1"}\n{"instruction": "b", "answer": "one"}\n')
    with pytest.raises(DataError, match=r"test_svamp.jsonl:2: no row of SVAMP"):
        llm_adapters.read_rows(path)


@pytest.mark.parametrize(
    ("task", "answer", "fault"),
    [
        ("AQuA", ["C"], r"\['C'\] is none of A, B, C, D, E"),
        ("AQuA", "c", "'c' is none of"),
        ("AQuA", "CD", "'CD' is none of"),
        ("boolq", "True", "'True' is none of true, false"),
        ("piqa", 1, "1 is none of solution1, solution2"),
        ("hellaswag", "ending5", "'ending5' is none of"),
        ("ARC-Easy", None, "None is none of answer1, "),
        ("gsm8k", True, "could not convert string to float: 'true'"),
        ("gsm8k", "nan", "'nan' is no finite number"),
    ],
)
def test_an_answer_that_nothing_can_match_is_refused_with_its_value(
    llm_adapters: ModuleType, tmp_path: Path, task: str, answer: object, fault: str
) -> None:
    path = tmp_path / f"{task}.jsonl"
    path.write_text(json.dumps({"instruction": "a", "answer": answer}))
    with pytest.raises(DataError, match=rf"{task}\.jsonl:1: no row of {task}: ValueError.*{fault}"):
        llm_adapters.read_rows(path)


def test_a_json_boolean_is_boolqs_answer(llm_adapters: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "boolq.jsonl"
    rows = [{"instruction": "a", "answer": answer} for answer in (True, False, "true")]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert [row.answer for row in llm_adapters.read_rows(path)] == ["true", "false", "true"]


def row(module: ModuleType, number: int, right: bool = True) -> Any:
    return module.ScoredRow("gsm8k", number, "is 1", "1", "1", right)


def test_results_go_on_after_a_torn_line(results_module: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    results = results_module.ResultsFile(path, {"base": "a"})
    results.add([row(results_module, 0), row(results_module, 1, False)])
    with path.open("a") as file:
        file.write('{"task": "gsm8k", "num')
    again = results_module.ResultsFile(path, {"base": "a"})
    assert list(again.rows) == [("gsm8k", 0), ("gsm8k", 1)]
    again.add([row(results_module, 2)])
    again.set_mlflow_run("id")
    last = results_module.ResultsFile(path, {"base": "a"})
    assert last.accuracy("gsm8k") == pytest.approx(2 / 3)
    assert last.mlflow_run == "id"


def test_results_of_another_evaluation_are_refused(
    results_module: ModuleType, tmp_path: Path
) -> None:
    path = tmp_path / "results.jsonl"
    results_module.ResultsFile(path, {"base": "a", "num_beams": 4})
    with pytest.raises(ConfigError, match="differs in num_beams; name another file"):
        results_module.ResultsFile(path, {"base": "a", "num_beams": 1})
    path.write_text("no results\n")
    with pytest.raises(ConfigError, match="holds no results"):
        results_module.ResultsFile(path, {"base": "a", "num_beams": 4})
