"""The OpenAI requests that are understood, and their limits.

Invariant: a request that exists is within every limit that doesn't depend on the model. What this
service can't do (tools, images, audio, logit_bias, best_of) is refused by name, never ignored;
what has no effect on an answer (user, metadata, ...) is taken and dropped.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_CHOICES = 16
MAX_PROMPTS = 64
MAX_STOPS = 16  # OpenAI takes 4; lm_eval's tasks have up to 8
MAX_STOP_CHARS = 256
MAX_TOP_LOGPROBS = 20
MAX_MESSAGES = 2048
MAX_MODEL_CHARS = 512
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]


class Wire(BaseModel):
    """What comes over the wire: no unknown key, no type guessed, no infinity."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    @model_validator(mode="before")
    @classmethod
    def _check_text(cls, value: Any) -> Any:
        # JSON can hold half of a character's pair, of which no tokenizer and no reply makes bytes
        if isinstance(value, dict):
            try:
                for key, entry in value.items():
                    _check_unicode(key, key)
                    _check_unicode(key, entry)
            except RecursionError:
                raise ValueError("is nested too deeply") from None
        return value


def _check_unicode(place: str, value: Any) -> None:
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"{place!a} isn't Unicode: {value[error.start]!a} stands alone at"
                    f" character {error.start}"
                ) from None
    elif isinstance(value, list):
        for entry in value:
            if not isinstance(entry, int):
                _check_unicode(place, entry)
    elif isinstance(value, dict):
        for key, entry in value.items():
            _check_unicode(place, key)
            _check_unicode(place, entry)


class StreamOptions(Wire):
    """What a stream carries beside the text."""

    include_usage: bool | None = None
    """A last chunk without choices has the usage."""
    include_obfuscation: bool | None = None


class SamplingRequest(Wire):
    """What both endpoints take."""

    model: str = Field(min_length=1, max_length=MAX_MODEL_CHARS)
    """An adapter (``tenant.name``, ``...@alias``, ``...:version``) or a base."""
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    """Up to 16 texts at which the answer ends; they aren't part of it."""
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """No part of OpenAI's API: sample among the k likeliest; 0: all."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = None

    @property
    def num_choices(self) -> int:
        """How many answers are wanted to each prompt."""
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts, whichever way they were written."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @model_validator(mode="after")
    def _check_common(self) -> Self:
        if self.logit_bias:
            raise ValueError("logit_bias isn't supported; leave it out")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream=true only")
        return self


class CompletionRequest(SamplingRequest):
    """``POST /v1/completions``."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1)]],
            Field(min_length=1, max_length=MAX_PROMPTS),
        ]
    )
    """Text, token ids, or a list of either."""
    echo: bool | None = None
    """The prompt comes before the answer; with logprobs, and max_tokens 0, it is scored."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    best_of: int | None = None
    suffix: str | None = None

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """The prompts, whichever way they were written."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.suffix:
            raise ValueError("suffix isn't supported; leave it out")
        if self.best_of is not None and self.best_of != self.num_choices:
            raise ValueError("best_of isn't supported beyond n; leave it out")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens 0 is for echo=true only; ask for at least 1 token")
        if self.num_choices * len(self.prompts) > MAX_PROMPTS:
            raise ValueError(
                f"n {self.num_choices} of {len(self.prompts)} prompts is more than"
                f" {MAX_PROMPTS} answers; send several requests"
            )
        if self.echo and self.logprobs is not None and self.stream:
            raise ValueError("echo with logprobs can't be streamed; leave stream out")
        return self


class TextPart(Wire):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Message(Wire):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    type: Literal["text"] | None = None
    """No part of OpenAI's API: lm_eval writes it into every turn."""

    @property
    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class JsonSchema(Wire):
    """A schema that the answer has to follow."""

    name: str = Field(max_length=64, pattern=r"^[A-Za-z0-9_-]+$")
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextFormat(Wire):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(Wire):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(Wire):
    """JSON of one schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")
]


class ChatRequest(SamplingRequest):
    """``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    modalities: list[str] | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None

    @property
    def token_limit(self) -> int | None:
        """The most tokens of an answer, by its new name or its old one."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def json_schema(self) -> dict[str, Any] | None:
        """The schema that the answer follows, None for any text."""
        if isinstance(self.response_format, JsonObjectFormat):
            return {"type": "object"}
        if isinstance(self.response_format, JsonSchemaFormat):
            return self.response_format.json_schema.schema_ or {"type": "object"}
        return None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.tools or self.tool_choice not in (None, "none", "auto"):
            raise ValueError("tools aren't supported; leave tools and tool_choice out")
        if self.modalities not in (None, ["text"]):
            raise ValueError('modalities: only ["text"] is supported')
        if self.max_tokens == 0:
            raise ValueError("max_tokens 0: ask for at least 1 token")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        return self
