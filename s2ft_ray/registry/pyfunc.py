"""The MLflow flavour: a registered adapter that answers after ``mlflow.pyfunc.load_model``.

    model = mlflow.pyfunc.load_model("models:/acme.support-bot@champion")
    model.predict(["How do I ...?"], params={"max_new_tokens": 64})

The base is loaded by the name that the adapter carries and must have its fingerprint; prompts are
rendered as they were in training.

Invariant: every prompt is answered by itself, with its own seed, so an answer doesn't depend on
what else was asked in the same call.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from s2ft_ray.bases import load_base_model, load_tokenizer
from s2ft_ray.config import ModelConfig
from s2ft_ray.data import encode_prompt
from s2ft_ray.data.formats import Prompt
from s2ft_ray.errors import AdapterError, ConfigError
from s2ft_ray.method import Adapter

DEFAULTS = {"max_new_tokens": 128, "temperature": 0.0, "seed": 0}
_ACCEPTED = (
    "pass a list of prompts, a list of {'messages': [...]}, or a DataFrame with a column prompt"
    " or messages"
)


def _load_pyfunc(data_path: str) -> "AdapterModel":
    """Load the adapter in `data_path` into its base: the name and form that MLflow calls."""
    adapter = Adapter.load(Path(data_path))
    if adapter.base.name is None:
        raise AdapterError(
            f"{data_path}: the adapter doesn't say the name of its base; load that yourself and"
            " call adapter.switch_into(model)"
        )
    base = ModelConfig(name_or_path=adapter.base.name, revision=adapter.base.revision)
    prompting = adapter.training.get("data", {})
    tokenizer = load_tokenizer(base, prompting.get("chat_template"))
    model = load_base_model(base)
    adapter.switch_into(model)
    row_format = prompting.get("format") or ("chat" if tokenizer.chat_template else "text")
    return AdapterModel(model, tokenizer, row_format)


class AdapterModel:
    """A base with one adapter in it, and how its prompts are rendered."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, row_format: str
    ) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = model.to(device).eval()
        self.tokenizer = tokenizer
        self.row_format = row_format

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> list[str]:
        """Return one answer for each prompt of `model_input`, in order.

        A plain prompt is a user's turn where the adapter was trained on chats, an instruction
        where on instructions, else literal text. Params: max_new_tokens, temperature (0 takes
        the likeliest token), seed. Raises ConfigError for input or params of another form.
        """
        settings = _read_params(params or {})
        prompts = [self._as_prompt(item, row) for row, item in enumerate(_rows(model_input))]
        encoded = [self._encode(prompt, row) for row, prompt in enumerate(prompts)]
        return [self._answer(ids, **settings) for ids in encoded]

    def _as_prompt(self, item: Any, row: int) -> Prompt:
        if isinstance(item, str):
            if self.row_format == "chat":
                return {"messages": [{"role": "user", "content": item}]}
            return {"instruction": item} if self.row_format == "instruction" else item
        messages = item.get("messages") if isinstance(item, Mapping) else None
        if not isinstance(messages, Iterable) or isinstance(messages, str):
            raise ConfigError(f"predict: row {row} is {_shown(item)}; {_ACCEPTED}")
        turns = list(messages)
        for turn in turns:
            if not isinstance(turn, Mapping) or not {"role", "content"} <= turn.keys():
                raise ConfigError(
                    f"predict: row {row}: a message is {_shown(turn)}; write"
                    " {'role': 'user', 'content': '...'}"
                )
        if not turns or turns[-1]["role"] == "assistant":
            raise ConfigError(f"predict: row {row}: the last message must be the user's")
        if self.tokenizer.chat_template is None:
            raise ConfigError(
                f"predict: row {row} is a conversation, and the base has no chat template; the"
                f" adapter was trained on {self.row_format}: pass plain prompts"
            )
        return {"messages": turns}

    def _encode(self, prompt: Prompt, row: int) -> list[int]:
        ids = encode_prompt(prompt, self.tokenizer)
        limit = self._context_limit()
        if not 0 < len(ids) < limit:
            raise ConfigError(
                f"predict: row {row} has {len(ids)} tokens; the base takes 1 to {limit - 1}"
            )
        return ids

    def _context_limit(self) -> int:
        return int(getattr(self.model.config, "max_position_embeddings", None) or 2**31)

    @torch.inference_mode()
    def _answer(
        self, ids: Sequence[int], max_new_tokens: int, temperature: float, seed: int
    ) -> str:
        device = self.model.device
        generator = torch.Generator().manual_seed(seed)
        stops = self._stop_tokens()
        tokens = torch.tensor([ids], device=device)
        answer: list[int] = []
        cache = None
        for _ in range(min(max_new_tokens, self._context_limit() - len(ids))):
            output = self.model(input_ids=tokens, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            token = _choose(output.logits[0, -1].float().cpu(), temperature, generator)
            if token in stops:
                break
            answer.append(token)
            tokens = torch.tensor([[token]], device=device)
        return str(self.tokenizer.decode(answer, skip_special_tokens=True))

    def _stop_tokens(self) -> set[int]:
        settings = self.model.generation_config
        listed = settings.eos_token_id if settings is not None else None
        stops = set(listed if isinstance(listed, list) else [listed])
        return {token for token in stops | {self.tokenizer.eos_token_id} if token is not None}


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    shares = torch.softmax(logits / temperature, dim=-1)
    return int(torch.multinomial(shares, 1, generator=generator))


def _rows(model_input: Any) -> list[Any]:
    if isinstance(model_input, pd.DataFrame):
        named = [name for name in ("prompt", "messages") if name in model_input.columns]
        if len(named) != 1:
            columns = ", ".join(map(str, model_input.columns)) or "none"
            raise ConfigError(f"predict: the DataFrame has the columns {columns}; {_ACCEPTED}")
        cells = model_input[named[0]].tolist()
        return cells if named[0] == "prompt" else [{"messages": cell} for cell in cells]
    if isinstance(model_input, str | Mapping):
        model_input = [model_input]
    if isinstance(model_input, pd.Series) or hasattr(model_input, "tolist"):
        model_input = model_input.tolist()
    if not isinstance(model_input, list | tuple):
        raise ConfigError(f"predict: the input is {_shown(model_input)}; {_ACCEPTED}")
    rows = list(model_input)
    return [_prompt_of(row) if isinstance(row, Mapping) else row for row in rows]


def _prompt_of(row: Mapping[str, Any]) -> Any:
    return row["prompt"] if set(row) == {"prompt"} else row


def _read_params(params: Mapping[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(params) - set(DEFAULTS))
    if unknown:
        raise ConfigError(f"predict: unknown params {unknown}; known: {', '.join(DEFAULTS)}")
    settings = {**DEFAULTS, **{key: value for key, value in params.items() if value is not None}}
    if settings["max_new_tokens"] < 1:
        raise ConfigError(f"predict: max_new_tokens is {settings['max_new_tokens']}; at least 1")
    if not 0 <= settings["temperature"] < float("inf"):
        raise ConfigError(f"predict: temperature is {settings['temperature']}; take 0 or more")
    return settings


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"
