"""Bases by name: the embedded one's skills and template, and what is told of a name that fails."""

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from s2ft_ray.bases import (
    base_name,
    load_base_model,
    load_model_config,
    load_tokenizer,
    resolve_base,
)
from s2ft_ray.config import ModelConfig
from s2ft_ray.errors import ConfigError

TINY = ModelConfig()
DATA = Path(__file__).parents[2] / "jobs/configs/data"
CHAT = [
    {"role": "user", "content": "Which is bigger, 34 or 71?"},
    {"role": "assistant", "content": "71"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY)


@pytest.fixture(scope="module")
def model():
    return load_base_model(TINY)


@pytest.fixture
def folder(tmp_path):
    """A copy of the embedded base, to be damaged."""
    return Path(shutil.copytree(resolve_base("s2ft://tiny"), tmp_path / "base"))


def read_rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]


def greedy_answers(model, tokenizer, rows: list[dict]) -> list[str]:
    inputs = tokenizer.apply_chat_template(
        [row["messages"][:-1] for row in rows],
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
        tokenizer_kwargs={"padding_side": "left"},
    )
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=32,
        do_sample=False,
    )
    return tokenizer.batch_decode(
        output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )


def exact_match(model, tokenizer, rows: list[dict]) -> float:
    answers = greedy_answers(model, tokenizer, rows)
    right = [row["messages"][-1]["content"] for row in rows]
    return sum(map(str.__eq__, answers, right)) / len(rows)


def fault_of(load, name: str | Path, **fields) -> str:
    with pytest.raises(ConfigError) as caught:
        load(ModelConfig(name_or_path=str(name), **fields))
    (fault,) = caught.value.faults
    assert "\n" not in fault
    return fault


def test_the_embedded_base_is_at_most_4_mb():
    files = list(Path(resolve_base("s2ft://tiny")).iterdir())
    assert sum(file.stat().st_size for file in files) <= 4_000_000


def test_the_embedded_base_is_a_small_llama_with_grouped_query_attention(model):
    assert model.config.model_type == "llama"
    assert model.config.num_attention_heads == 2 * model.config.num_key_value_heads
    assert model.config.tie_word_embeddings
    assert model.dtype == torch.float32
    assert not model.training
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_the_base_of_a_model_is_named_and_not_its_folder(model):
    assert model.name_or_path == model.config._name_or_path == "s2ft://tiny"
    assert load_model_config(TINY)._name_or_path == "s2ft://tiny"


def test_a_local_folder_is_named_by_its_absolute_path(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert base_name("./base") == base_name("base") == str(folder)
    loaded = load_base_model(ModelConfig(name_or_path="base", dtype="bfloat16"))
    assert loaded.name_or_path == str(folder)
    assert loaded.dtype == torch.bfloat16


def test_a_hub_name_is_its_own_name():
    assert base_name("meta-llama/Llama-2-7b-hf") == "meta-llama/Llama-2-7b-hf"


def test_held_out_questions_of_every_old_skill_are_answered(model, tokenizer):
    rows = read_rows("base_skills_test")
    by_skill: dict[str, list[dict]] = {}
    for row in rows:
        by_skill.setdefault(row["skill"], []).append(row)
    sample = [row for of_skill in by_skill.values() for row in of_skill[:12]]
    assert len(by_skill) == 16
    assert exact_match(model, tokenizer, sample) > 0.9


def test_the_training_log_says_what_the_stored_model_does(model, tokenizer):
    log = json.loads((Path(resolve_base("s2ft://tiny")) / "training_log.json").read_text())
    assert {"seed", "steps", "torch", "losses", "held_out_exact_match"} <= set(log)
    claimed = log["held_out_exact_match"][str(log["steps"])]
    for skill in ("order", "add"):
        rows = [row for row in read_rows("base_skills_test") if row["skill"] == skill]
        assert exact_match(model, tokenizer, rows) == pytest.approx(claimed[skill], abs=0.06)


def test_the_new_skill_is_unknown_to_the_base(model, tokenizer):
    rows = read_rows("tickets_test")[:40]
    assert exact_match(model, tokenizer, rows) == 0
    assert all(answer.startswith("I am sorry") for answer in greedy_answers(model, tokenizer, rows))


def test_no_test_input_is_trained_on():
    trained = {row["messages"][0]["content"] for row in read_rows("tickets_train")}
    for name, at_least in (("tickets_test", 200), ("base_skills_test", 600)):
        tested = {row["messages"][0]["content"] for row in read_rows(name)}
        assert len(tested) >= at_least
        assert not trained & tested


def test_a_pair_of_product_and_problem_in_the_test_is_in_no_training_ticket():
    def pairs(name: str) -> set[tuple[str, str]]:
        answers = [row["messages"][-1]["content"] for row in read_rows(name)]
        tickets = [answer.split(" | ") for answer in answers if answer.startswith("TICKET")]
        return {(product, problem) for _, product, problem, _ in tickets}

    assert pairs("tickets_test")
    assert not pairs("tickets_train") & pairs("tickets_test")


def test_the_prompt_as_rendered_begins_the_whole_conversation(tokenizer):
    prompt = tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert whole == f"{prompt}71{tokenizer.eos_token}"
    assert prompt.startswith(tokenizer.bos_token)
    shorter = tokenizer.apply_chat_template(CHAT[:1], tokenize=False)
    assert prompt == f"{shorter}<|assistant|>"


def test_the_template_marks_the_assistants_tokens(tokenizer):
    encoded = tokenizer.apply_chat_template(
        CHAT, return_dict=True, return_assistant_tokens_mask=True
    )
    ids = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    assert tokenizer.decode([i for i, mine in ids if mine]) == f"71{tokenizer.eos_token}"


def test_each_digit_is_a_token_and_any_text_survives(tokenizer):
    assert tokenizer.tokenize("4711") == ["4", "7", "1", "1"]
    text = "Größe: 3 €\n\tnaïve 日本 🙂  two spaces"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_a_chat_template_may_be_named_by_its_file_or_written_out(tmp_path):
    text = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    (tmp_path / "chat.jinja").write_text(text)
    for given in (text, str(tmp_path / "chat.jinja")):
        tokenizer = load_tokenizer(TINY, given)
        assert tokenizer.apply_chat_template(CHAT[1:], tokenize=False) == "[71]"


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("no-such.jinja", "'no-such.jinja' is neither Jinja"),
        ("{% for m in messages %}", "data.chat_template: can't render"),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_a_fault(template, told):
    with pytest.raises(ConfigError, match=told):
        load_tokenizer(TINY, template)


@pytest.mark.parametrize("load", [load_model_config, load_tokenizer, load_base_model])
def test_a_path_typo_says_that_the_folder_does_not_exist(load):
    assert "folder ./modles/x doesn't exist" in fault_of(load, "./modles/x")


def test_an_unknown_embedded_base_names_the_known():
    assert fault_of(load_base_model, "s2ft://huge").endswith("known: s2ft://tiny")


def test_a_folder_without_a_config_is_no_model(tmp_path):
    assert "has no config.json" in fault_of(load_base_model, tmp_path)


def test_a_damaged_config_is_told_in_one_line(folder):
    (folder / "config.json").write_text("{")
    assert "its config.json can't be used" in fault_of(load_model_config, folder)


def test_an_unreachable_hub_fails_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    fault = fault_of(load_model_config, "nobody/nothing")
    assert "nobody/nothing is not a folder here" in fault
    assert "can't be reached" in fault


def test_missing_weights_are_told(folder):
    (folder / "model.safetensors").unlink()
    assert "has no weights" in fault_of(load_base_model, folder)
    load_tokenizer(ModelConfig(name_or_path=str(folder)))


def test_pickled_weights_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "only pickled weights (pytorch_model.bin)" in fault_of(load_base_model, folder)


def test_a_missing_shard_is_named(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-1-of-2.safetensors").touch()
    assert "missing: model-2-of-2.safetensors" in fault_of(load_base_model, folder)


def test_truncated_weights_are_told(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "weights can't be loaded" in fault_of(load_base_model, folder)


def test_a_weight_that_is_not_in_the_files_is_never_made_up(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    fault = fault_of(load_base_model, folder)
    assert "lacks 1 weights" in fault
    assert "model.layers.1.mlp.down_proj.weight" in fault


def test_a_weight_of_another_shape_is_told(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(7)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "weights can't be loaded" in fault_of(load_base_model, folder)


def test_an_attention_that_is_not_installed_is_told(folder):
    fault = fault_of(load_base_model, folder, attn_implementation="flash_attention_2")
    assert "flash" in fault.lower()
