"""The paper's runs: each loads, trains the paper's share, and renders the prompt that is scored."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, LlamaConfig, MistralConfig, PretrainedConfig

from s2ft_ray.config import RunConfig, load_config
from s2ft_ray.data import encode_prompt, render_prompt
from s2ft_ray.method import check_supported, count_trainable

REPO = Path(__file__).parents[2]
CONFIGS = sorted((REPO / "jobs" / "configs" / "paper").glob("*.yaml"))
SMALL = sorted((REPO / "jobs" / "configs").glob("*.yaml"))
LR = {"commonsense": 2e-4, "arithmetic": 1e-3, "instruction": 2e-5}
# Shapes as the models' config.json has them, and their parameters.
SHAPES: dict[str, tuple[PretrainedConfig, int]] = {
    "llama2-7b": (
        LlamaConfig(architectures=["LlamaForCausalLM"], hidden_size=4096, intermediate_size=11008),
        6_738_415_616,
    ),
    "llama3-8b": (
        LlamaConfig(
            architectures=["LlamaForCausalLM"],
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_key_value_heads=8,
        ),
        8_030_261_248,
    ),
    "mistral-7b": (
        MistralConfig(architectures=["MistralForCausalLM"], num_key_value_heads=8),
        7_241_732_096,
    ),
}
SHARES = {"llama2-7b": 0.0084, "llama3-8b": 0.0070, "mistral-7b": 0.0078}


def test_every_model_has_every_run() -> None:
    names = {f"{model}-{task}" for model in SHAPES for task in LR}
    assert {path.stem for path in CONFIGS} == names


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_run_has_the_papers_hyper_parameters(path: Path) -> None:
    config = load_config(path)
    model, _, task = path.stem.rpartition("-")
    assert config.name == path.stem
    assert config.optim.lr == LR[task]
    assert (config.optim.betas, config.optim.weight_decay) == ((0.9, 0.95), 0.0)
    assert (config.optim.global_batch_size, config.optim.max_grad_norm) == (64, 1.0)
    long = task != "instruction"
    expected = ("linear", 100, 3) if long else ("cosine", 0, 1)
    optim = config.optim
    assert (optim.schedule, optim.warmup_steps, optim.epochs) == expected
    assert config.data.max_seq_len == 2048
    assert config.model.dtype == "bfloat16"
    shape, num_parameters = SHAPES[model]
    check_supported(shape)
    share = count_trainable(shape, config.method) / num_parameters
    assert share == pytest.approx(SHARES[model], abs=5e-5)


def test_training_prompt_is_the_prompt_that_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(REPO / "jobs")
    from evaluation.llm_adapters import render

    config: RunConfig = load_config(CONFIGS[0])
    tokenizer = AutoTokenizer.from_pretrained(REPO / "s2ft_ray" / "bases" / "tiny")
    scored = tokenizer(render("What is 1 + 1?"))["input_ids"]
    assert config.data.chat_template is not None
    tokenizer.chat_template = (REPO / config.data.chat_template).read_text()
    row = {"instruction": "What is 1 + 1?", "input": "", "output": "2"}
    assert encode_prompt(row, tokenizer) == scored


@pytest.mark.parametrize("model", SHAPES)
def test_an_instructions_input_stands_in_a_block_of_its_own(model: str) -> None:
    config = load_config(REPO / "jobs" / "configs" / "paper" / f"{model}-instruction.yaml")
    assert (config.data.format, config.data.chat_template) == ("instruction", None)
    tokenizer = AutoTokenizer.from_pretrained(REPO / "s2ft_ray" / "bases" / "tiny")
    tokenizer.chat_template = None  # as the bases that are named
    row = {"instruction": "Add up.", "input": "1, 1", "output": "2"}
    assert render_prompt(row, tokenizer) == (
        "### Instruction:\nAdd up.\n\n### Input:\n1, 1\n\n### Response:\n"
    )
    plain = render_prompt({**row, "input": ""}, tokenizer)
    assert plain == "### Instruction:\nAdd up.\n\n### Response:\n"


@pytest.mark.parametrize("path", SMALL, ids=lambda path: path.stem)
def test_the_small_runs_are_valid_and_their_data_is_there(path: Path) -> None:
    config = load_config(path)
    files = [config.data.train] if isinstance(config.data.train, str) else config.data.train
    names = [it if isinstance(it, str) else it.path for it in [*files, config.data.eval] if it]
    assert names
    assert all((REPO / name).is_file() for name in names)


def test_the_run_of_a_public_model_is_valid() -> None:
    config = load_config(REPO / "jobs/configs/public/word_problems.yaml")
    assert config.registered_name == "acme.word-problems"
