"""Where the assistant speaks in a rendered chat: spans of characters of the template's text.

A template with ``{% generation %}`` markers says it itself. Others are rendered turn by turn,
and a turn is what the text gained; that holds only if earlier turns keep their text when turns
are added, which is checked for every row.

Invariant: nothing is guessed: a chat whose turns can't be found in its text is a fault.
"""

import re
from dataclasses import dataclass

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from s2ft_ray.data.formats import Turn, apply_template

GENERATION_MARKER = re.compile(r"{%[-+]?\s*generation\b")
Span = tuple[int, int]


class ChatError(ValueError):
    """A chat that the template refuses, or whose turns can't be told apart in its text."""


@dataclass(frozen=True)
class RenderedChat:
    """A chat as text, up to the end of its last answer."""

    text: str
    answers: list[Span]
    """What the assistant says, its end token included, in the order of the turns."""
    prompt_end: int
    """Where the last answer's prompt ends."""


def render_chat(
    turns: list[Turn], tokenizer: PreTrainedTokenizerBase, *, every_answer: bool
) -> RenderedChat:
    """Render `turns` and find the last answer, or every one. Raises ChatError."""
    try:
        marked = _has_markers(tokenizer)
        render = _render_marked if marked else _render_by_prefixes
        return render(turns, tokenizer, every_answer)
    except (jinja2.TemplateError, TypeError) as error:  # what a template makes of odd turns
        raise ChatError(f"the chat template refuses it: {error}") from error


def _has_markers(tokenizer: PreTrainedTokenizerBase) -> bool:
    return GENERATION_MARKER.search(tokenizer.get_chat_template()) is not None


def _render_by_prefixes(
    turns: list[Turn], tokenizer: PreTrainedTokenizerBase, every_answer: bool
) -> RenderedChat:
    text = apply_template(turns, tokenizer)
    last = len(turns) - 1
    answers = []
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant" or (index != last and not every_answer):
            continue
        before = apply_template(turns[:index], tokenizer, add_generation_prompt=True)
        after = text if index == last else apply_template(turns[: index + 1], tokenizer)
        if not (text.startswith(after) and after.startswith(before)):
            raise ChatError(
                f"the chat template writes the turns up to {index} otherwise when more follow, so"
                " what the assistant says can't be told from the rest; put"
                " {% generation %} markers into the template (data.chat_template)"
            )
        answers.append((len(before), _end_of_answer(after, tokenizer)))
    return RenderedChat(text[: answers[-1][1]], answers, answers[-1][0])


def _end_of_answer(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Leave out the line break that many templates write behind the end token."""
    stripped = text.rstrip()
    return len(stripped) if stripped.endswith(tokenizer.eos_token) else len(text)


def _render_marked(
    turns: list[Turn], tokenizer: PreTrainedTokenizerBase, every_answer: bool
) -> RenderedChat:
    texts, spans = render_jinja_template(
        conversations=[turns],
        chat_template=tokenizer.get_chat_template(),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    text, answers = texts[0], [(start, end) for start, end in spans[0] if start < end]
    if not answers:
        raise ChatError("the chat template's {% generation %} markers mark nothing in it")
    prompt = apply_template(turns[:-1], tokenizer, add_generation_prompt=True)
    prompt_end = len(prompt) if text.startswith(prompt) else answers[-1][0]
    if not every_answer:
        answers = [span for span in answers if span[0] >= prompt_end] or answers[-1:]
    return RenderedChat(text[: answers[-1][1]], answers, prompt_end)
