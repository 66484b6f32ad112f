"""From a request's prompt or messages to token ids, checked against the base's limits.

Invariant: what comes out fits: prompt and answer together are within the base's context.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from s2ft_ray.data import encode_prompt
from s2ft_ray.errors import ConfigError, ServingError
from s2ft_ray.serving.schemas import ChatRequest, CompletionRequest
from s2ft_ray.serving.wire_errors import ApiError

Render = Callable[[str, Sequence[Mapping[str, Any]], Mapping[str, Any], int], str]
"""Template, turns, special tokens, most characters: `TemplateRenderer.render`."""
_MAX_CHARS_A_TOKEN = 64
# Of a chat template: what Jinja raises, what its expressions do, and a renderer's refusal.
_TEMPLATE_ERRORS = (
    ConfigError,
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Limits:
    """What a base takes."""

    context_tokens: int
    """Prompt and answer together."""
    output_tokens: int
    """The longest answer that the service allows."""
    vocab_size: int

    @property
    def max_chars(self) -> int:
        """A text above this is refused before it is tokenized."""
        return self.context_tokens * _MAX_CHARS_A_TOKEN


def encode_prompts(
    request: CompletionRequest, tokenizer: PreTrainedTokenizerBase, limits: Limits
) -> list[list[int]]:
    """Return the token ids of each prompt of a completion. Raises ApiError."""
    encoded = []
    for prompt in request.prompts:
        if isinstance(prompt, str):
            _check_chars(prompt, limits, "prompt")
            prompt = encode_prompt(prompt, tokenizer)  # as training encodes plain text
        elif max(prompt) >= limits.vocab_size:
            raise ApiError(
                400,
                f"prompt: token id {max(prompt)} is not in the vocabulary of"
                f" {limits.vocab_size} tokens",
                param="prompt",
            )
        encoded.append(_checked(prompt, limits, "prompt"))
    return encoded


def encode_chat(
    request: ChatRequest,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None,
    limits: Limits,
    render: Render,
) -> list[int]:
    """Return the token ids of a conversation up to where the answer begins. Raises ApiError.

    The base's own template is rendered here; another one, a tenant's program, by `render`.
    """
    turns: list[dict[str, Any]] = []
    for message in request.messages:
        role = "system" if message.role == "developer" else message.role
        turns.append({"role": role, "content": message.text})
    _check_chars("".join(turn["content"] for turn in turns), limits, "messages")
    if (chat_template or tokenizer.chat_template) is None:
        raise ApiError(
            400,
            f"The model `{request.model[:200]}` has no chat template; POST to /v1/completions",
            param="messages",
        )
    try:
        if chat_template is None:
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        else:
            text = render(chat_template, turns, tokenizer.special_tokens_map, limits.max_chars)
    except ServingError:
        raise  # of the renderer's own
    except _TEMPLATE_ERRORS as error:
        raise ApiError(
            400, f"messages: the model's chat template refuses them: {error}", param="messages"
        ) from error
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return _checked(list(ids), limits, "messages")


def answer_tokens(
    prompts: Sequence[Sequence[int]], asked: int | None, default: int | None, limits: Limits
) -> int:
    """Return the most tokens of one answer; `default` where the request doesn't say.

    Raises ApiError where prompt and answer are beyond the context or the service's limit.
    """
    longest = max(len(prompt) for prompt in prompts)
    room = limits.context_tokens - longest
    if asked is None:
        most = limits.output_tokens if default is None else min(default, limits.output_tokens)
        return min(room, most)
    if asked > limits.output_tokens:
        raise ApiError(
            400,
            f"max_tokens: {asked} is above the {limits.output_tokens} tokens that one answer may"
            " have here",
            param="max_tokens",
        )
    if asked > room:
        raise _too_long(longest, asked, limits, "max_tokens")
    return asked


def _check_chars(text: str, limits: Limits, param: str) -> None:
    if len(text) > limits.max_chars:
        raise ApiError(
            400,
            f"{param}: {len(text)} characters can't fit the {limits.context_tokens} tokens of the"
            " model's context; shorten it",
            param=param,
            code="context_length_exceeded",
        )


def _checked(ids: list[int], limits: Limits, param: str) -> list[int]:
    if not ids:
        raise ApiError(400, f"{param}: is empty; send at least one token", param=param)
    if len(ids) >= limits.context_tokens:
        raise _too_long(len(ids), None, limits, param)
    return ids


def _too_long(prompt: int, answer: int | None, limits: Limits, param: str) -> ApiError:
    asked = f"{prompt} tokens of prompt"
    if answer is not None:
        asked += f" and {answer} of answer"
    return ApiError(
        400,
        f"This model's context is {limits.context_tokens} tokens; the request asks for {asked}."
        " Shorten the prompt, or ask for a shorter answer",
        param=param,
        code="context_length_exceeded",
    )
