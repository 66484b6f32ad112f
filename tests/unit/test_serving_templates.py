"""A tenant's chat template is a program: what it may cost, and whom."""

import asyncio
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import openai
import pytest
from serving_fakes import BASE, TOKENIZER, Parrot, Silent, adapter_route, make_catalog
from serving_site import HELLO, served

from s2ft_ray.errors import ConfigError
from s2ft_ray.serving.bodies import Identity
from s2ft_ray.serving.catalog import CatalogModel
from s2ft_ray.serving.generation import Generator
from s2ft_ray.serving.prompts import Limits
from s2ft_ray.serving.routes import Route, ServedRequest
from s2ft_ray.serving.schemas import ChatRequest
from s2ft_ray.serving.templates import TemplateRenderer

TURNS = [{"role": "user", "content": "Où?"}, {"role": "assistant", "content": "\ud83d"}]
TOKENS = TOKENIZER.special_tokens_map
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
BOMBS = {
    "loops": LOOPS,
    "one expression": "{{ 10 ** (10 ** 9) }}",
    "memory": "{{ messages[0].content * 10 ** 10 }}",
    "a long text": "{{ messages[0].content * 10 ** 6 }}",
}


@pytest.fixture(scope="module")
def renderer() -> Iterator[TemplateRenderer]:
    renderer = TemplateRenderer()
    yield renderer
    renderer.close()


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_bomb_is_refused_in_time_and_others_are_rendered(
    renderer: TemplateRenderer, bomb: str
) -> None:
    renderer.render("x", TURNS, TOKENS, 100)  # the process is there
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"more than the 1 s|too much memory|100 can fit"):
        renderer.render(bomb, TURNS, TOKENS, 100)
    assert time.monotonic() - started < 20  # of one second's work, on a machine that is shared
    own = str(TOKENIZER.chat_template)
    text = renderer.render(own, TURNS, TOKENS, 1000)
    assert text == TOKENIZER.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)


def test_what_was_too_expensive_costs_nothing_a_second_time(renderer: TemplateRenderer) -> None:
    for _ in range(2):
        started = time.monotonic()
        with pytest.raises(ConfigError, match="more than the 1 s"):
            renderer.render(LOOPS + "again", TURNS, TOKENS, 100)
    assert time.monotonic() - started < 0.2


def test_a_client_is_told_the_limit() -> None:
    route = replace(adapter_route("acme.bot"), chat_template=LOOPS)
    model = CatalogModel("acme.bot", live={"champion": route})
    with (
        served(make_catalog(model)) as site,
        pytest.raises(openai.BadRequestError, match="more than the 1 s of a processor") as refused,
    ):
        site.client("acme").chat.completions.create(model="acme.bot", messages=HELLO)
    assert refused.value.param == "messages"


def test_streams_go_on_while_a_prompt_is_encoded() -> None:
    is_rendering, go_on = threading.Event(), threading.Event()

    def hang(*_: object) -> str:
        is_rendering.set()
        assert go_on.wait(10)
        return "x"

    def ask(template: str | None) -> ServedRequest:
        request = ChatRequest(model=BASE, messages=HELLO, stream=True)  # type: ignore[arg-type]
        route = Route(BASE, "f", chat_template=template)
        return ServedRequest(request, route, Identity("i", 0, BASE, "f"), "r", "acme")

    async def scenario() -> Any:
        limits = Limits(context_tokens=512, output_tokens=256, vocab_size=len(TOKENIZER))
        generator = Generator(Parrot(), TOKENIZER, limits, Silent(), hang)
        slow = asyncio.create_task(anext(generator.answer(ask("{{ a tenant's }}"))))
        while not is_rendering.is_set():
            await asyncio.sleep(0.001)
        other = [text async for text in generator.answer(ask(None))]
        assert not slow.done()
        go_on.set()
        assert "content" in await slow
        return other

    assert asyncio.run(scenario())[-1].endswith("[DONE]\n\n")
