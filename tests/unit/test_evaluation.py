import pytest
import torch
from data_parts import bytelevel_tokenizer
from method_models import VOCABULARY, build_model

from s2ft_ray.data import EvalPrompt
from s2ft_ray.training.evaluation import answer
from s2ft_ray.training.parallel import Workers

SIZES = {
    "gpt2": {"n_positions": 24},
    "opt": {"max_position_embeddings": 24},
    "llama": {"max_position_embeddings": 24},
}


@pytest.mark.parametrize("family", SIZES)
@pytest.mark.parametrize("num_prompt", [4, 20, 23])
def test_an_answer_ends_with_the_context_at_the_latest(
    family: str, num_prompt: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(family, **SIZES[family])
    model.generation_config.eos_token_id = None
    ids = torch.randint(3, VOCABULARY, (num_prompt,)).tolist()
    tokenizer = bytelevel_tokenizer()
    told: list[torch.Tensor] = []
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **_: told.append(ids) or "text")
    workers = Workers(torch.device("cpu"), None)  # type: ignore[arg-type]
    prompt = EvalPrompt("as text", "expected", ids)
    assert answer(model, tokenizer, [prompt], max_new_tokens=8, workers=workers) == ["text"]
    assert len(told[0]) == min(8, 24 - num_prompt)
