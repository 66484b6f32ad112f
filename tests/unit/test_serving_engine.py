"""The engine against merged models: whatever is served beside it, each request gets its own."""

import asyncio
import copy
import os
import random
import threading
from contextlib import aclosing

import pytest
import torch
from serving_worlds import (
    adapters,
    base,
    build_adapter,
    merged,
    request,
    running_engine,
    tokenizer,
    tokens,
)

from s2ft_ray.errors import AdapterError, ConfigError, ServingError
from s2ft_ray.method import Adapter
from s2ft_ray.serving.engine import Engine
from s2ft_ray.serving.requests import AdapterKey

NUM_SCHEDULES = int(os.environ.get("S2FT_SERVING_SCHEDULES", "6"))
NUM_TOKENS = 8
PROMPTS = [(1, 52, 83), (1, *range(100, 117)), (1, 7), (1, *range(300, 341))]
ROOM_FOR_TWO = 2 * 4 * 58 * (128 * 4 + 8)  # of the largest: 58 rows in each of 4 layers


@pytest.fixture(scope="module")
def expected() -> dict[tuple[AdapterKey | None, int], list[int]]:
    """The greedy tokens of each merged model for each prompt."""
    answers = {}
    for key in [None, *adapters()]:
        model = merged(key)
        for place, prompt in enumerate(PROMPTS):
            ids = torch.tensor([prompt])
            for _ in range(NUM_TOKENS):
                with torch.no_grad():
                    chosen = model(ids).logits[0, -1].argmax()
                ids = torch.cat([ids, chosen[None, None]], dim=1)
            answers[key, place] = ids[0, len(prompt) :].tolist()
    return answers


def test_merged_models_differ(expected: dict[tuple[AdapterKey | None, int], list[int]]) -> None:
    answers = [
        tuple(token for place in range(len(PROMPTS)) for token in expected[key, place])
        for key in [None, *adapters()]
    ]
    assert len(set(answers)) == len(answers)


@pytest.mark.parametrize("slot_bytes", [ROOM_FOR_TWO, 2**24], ids=["two fit", "all fit"])
def test_greedy_tokens_are_the_merged_models_in_any_mix(
    slot_bytes: int, expected: dict[tuple[AdapterKey | None, int], list[int]]
) -> None:
    async def play() -> int:
        num_checked = 0
        async with running_engine(slot_bytes=slot_bytes) as engine:

            async def one(name: str, draw: random.Random) -> None:
                key = draw.choice([None, *adapters()])
                place, count = draw.randrange(len(PROMPTS)), draw.randint(1, NUM_TOKENS)
                await asyncio.sleep(draw.choice([0, 0, 0.002, 0.01]))
                asked = request(name, PROMPTS[place], key, max_tokens=count)
                if draw.random() < 0.1:
                    async with aclosing(engine.generate(asked)) as outputs:
                        await anext(outputs)  # and goes away
                    return
                assert await tokens(engine, asked) == expected[key, place][:count]
                nonlocal num_checked
                num_checked += 1

            for seed in range(NUM_SCHEDULES):
                draw = random.Random(seed)
                count = draw.randint(6, 16)
                each = [one(f"{seed}-{i}", random.Random(f"{seed}-{i}")) for i in range(count)]
                await asyncio.wait_for(asyncio.gather(*each), 60)
            assert engine.stats().num_running == 0
            assert slot_bytes != ROOM_FOR_TWO or engine.stats().num_loads >= len(adapters())
        return num_checked

    assert asyncio.run(play()) >= 5 * NUM_SCHEDULES


def test_scores_are_the_merged_models_also_two_at_once() -> None:
    keys = [None, *list(adapters())[2:5]]
    ids = torch.tensor([PROMPTS[3]])
    wanted = []
    for key in keys:
        with torch.no_grad():
            logprobs = merged(key)(ids).logits[0, :-1].log_softmax(-1)
        wanted.append(logprobs.gather(1, ids[0, 1:, None])[:, 0])

    async def score() -> list[list[float]]:
        async with running_engine() as engine:
            beside = asyncio.create_task(
                tokens(engine, request("beside", PROMPTS[0], max_tokens=60))
            )
            each = [engine.score(PROMPTS[3], key, 2) for key in keys]
            scored = await asyncio.gather(*each)
            await beside
        assert scored[0][0].logprob is None
        assert all(len(token.top_logprobs) == 2 for token in scored[0][1:])
        return [[token.logprob or 0.0 for token in row[1:]] for row in scored]

    for got, row in zip(asyncio.run(score()), wanted, strict=True):
        torch.testing.assert_close(torch.tensor(got), row, atol=1e-4, rtol=1e-4)


def test_a_bf16_base_scores_as_its_merged_models_but_for_rounding() -> None:
    half = copy.deepcopy(base()).bfloat16()
    ids = torch.tensor([PROMPTS[3]])

    async def score(key: AdapterKey) -> list[float]:
        engine = Engine(half, tokenizer(), adapters().__getitem__, slot_bytes=2**20)
        engine.start()
        try:
            return [token.logprob or 0.0 for token in (await engine.score(PROMPTS[3], key))[1:]]
        finally:
            await asyncio.to_thread(engine.stop, 5.0)

    for key in list(adapters())[2:4]:
        with torch.no_grad():
            logprobs = merged(key)(ids).logits[0, :-1].log_softmax(-1)
        wanted = logprobs.gather(1, ids[0, 1:, None])[:, 0]
        off = (torch.tensor(asyncio.run(score(key))) - wanted).abs()
        assert off.mean() < 0.1
        assert off.max() < 0.5


def test_a_seed_gives_the_same_tokens_alone_and_in_a_crowd() -> None:
    key = next(iter(adapters()))

    async def play() -> tuple[list[int], list[int], list[int]]:
        async with running_engine() as engine:

            def drawn(name: str, seed: int | None) -> asyncio.Task[list[int]]:
                asked = request(
                    name, PROMPTS[0], key, temperature=1.0, top_p=0.9, seed=seed, max_tokens=20
                )
                return asyncio.create_task(tokens(engine, asked))

            alone = await drawn("alone", 7)
            crowd = [drawn(f"other-{i}", i) for i in range(5)]
            again = await drawn("again", 7)
            other = await crowd[3]
            await asyncio.gather(*crowd)
            return alone, again, other

    alone, again, other = asyncio.run(play())
    assert alone == again
    assert alone != other


def test_json_fits_its_schema() -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }

    async def play() -> list[int]:
        async with running_engine() as engine:
            asked = request("json", PROMPTS[0], json_schema=schema, ignore_eos=False, max_tokens=40)
            outputs = [output async for output in engine.generate(asked)]
            assert outputs[-1].finish_reason == "stop"
            with pytest.raises(ConfigError, match="json_schema"):
                await tokens(engine, request("bad", PROMPTS[0], json_schema={"type": "no"}))
            return [output.token_id for output in outputs]

    text = tokenizer().decode(asyncio.run(play()), skip_special_tokens=True)
    assert text in ('{"ok":true}', '{"ok":false}')


def test_concurrent_first_requests_load_an_adapter_once_and_faults_stay_with_their_own() -> None:
    good, bad = list(adapters())[:2]
    loads: list[AdapterKey] = []

    def load(key: AdapterKey) -> Adapter:
        loads.append(key)
        if key == bad:
            raise AdapterError("its file is damaged")
        return adapters()[key]

    async def play() -> None:
        async with running_engine(load) as engine:
            each = [tokens(engine, request(f"{i}", PROMPTS[0], good)) for i in range(6)]
            each.append(tokens(engine, request("bad", PROMPTS[0], bad)))
            answers = await asyncio.gather(*each, return_exceptions=True)
            assert isinstance(answers.pop(), AdapterError)
            assert len({tuple(answer) for answer in answers if isinstance(answer, list)}) == 1
            engine.check_health()

    asyncio.run(play())
    assert sorted(map(str, loads)) == sorted(map(str, [good, bad]))


def test_an_adapter_of_another_base_or_fingerprint_is_refused() -> None:
    key = next(iter(adapters()))
    foreign = build_adapter(0, {"down": 3}, torch.nn.Linear(2, 2))
    foreign_key = AdapterKey("acme.foreign", "1", foreign.fingerprint)

    async def play() -> None:
        async with running_engine(lambda _: foreign) as engine:
            with pytest.raises(AdapterError, match="the registry names"):
                await tokens(engine, request("a", PROMPTS[0], key))
            with pytest.raises(AdapterError, match="of base"):
                await tokens(engine, request("b", PROMPTS[0], foreign_key))

    asyncio.run(play())


def test_an_adapter_that_can_never_fit_is_refused() -> None:
    async def play() -> None:
        async with running_engine(slot_bytes=1000) as engine:
            with pytest.raises(AdapterError, match="more slot bytes"):
                await tokens(engine, request("a", PROMPTS[0], next(iter(adapters()))))

    asyncio.run(play())


def test_a_request_that_leaves_frees_its_pages() -> None:
    async def play() -> None:
        async with running_engine() as engine:
            for i in range(8):  # each takes most of the cache: only one fits
                asked = request(f"{i}", (1,) * 400, max_tokens=100)
                async with aclosing(engine.generate(asked)) as outputs:
                    await asyncio.wait_for(anext(outputs), 20)
            assert engine.stats().num_running == 0

    asyncio.run(play())


def test_the_longest_request_is_served_and_a_longer_one_refused() -> None:
    async def play() -> None:
        async with running_engine(cache_tokens=96) as engine:
            most = engine.max_tokens
            asked = request("most", (1,) * (most - 4), max_tokens=4)
            assert len(await asyncio.wait_for(tokens(engine, asked), 30)) == 4
            with pytest.raises(ConfigError, match="has room for"):
                await tokens(engine, request("more", (1,) * most, max_tokens=1))
            with pytest.raises(ConfigError, match="empty"):
                await tokens(engine, request("none", ()))
            for count in (0, -1):
                with pytest.raises(ConfigError, match="max_tokens"):
                    await tokens(engine, request("none", (1,), max_tokens=count))
            both = [request(f"{i}", (1,) * 40, max_tokens=50) for i in range(3)]
            answers = await asyncio.gather(*(tokens(engine, asked) for asked in both))
            assert [len(answer) for answer in answers] == [50] * 3

    asyncio.run(play())


def test_long_prompts_and_a_full_cache_change_no_token() -> None:
    keys = [None, *list(adapters())[1:5:2]]
    prompt = tuple(1 + (37 * i) % 700 for i in range(150))  # more than one batch holds
    asked = [
        request(f"{i}", prompt[: 150 - 40 * i], key, max_tokens=25, temperature=i / 2, seed=i)
        for i, key in enumerate(keys)
    ]

    async def play(cache_tokens: int) -> list[list[int]]:
        sizes = {"cache_tokens": cache_tokens, "max_batch_tokens": 64}
        async with running_engine(**sizes) as engine:
            each = (tokens(engine, one) for one in asked)
            return await asyncio.wait_for(asyncio.gather(*each), 60)

    roomy = asyncio.run(play(1024))
    # Room for the longest alone: the others are thrown out, and start again where they were.
    assert asyncio.run(play(192)) == roomy
    ids = torch.tensor([asked[0].prompt_ids])
    model = merged(None)
    for token in roomy[0]:
        with torch.no_grad():
            assert int(model(ids).logits[0, -1].argmax()) == token
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


def test_a_stuck_loop_is_seen() -> None:
    async def play() -> None:
        async with running_engine(stuck_after_s=0.2) as engine:
            go_on = threading.Event()
            route = engine._batching._route

            def wait(batch: list[tuple[str, int]]) -> None:
                go_on.wait(20)
                route(batch)

            engine._batching._route = wait
            running = asyncio.create_task(tokens(engine, request("a", PROMPTS[0])))
            await asyncio.sleep(0.4)
            with pytest.raises(ServingError, match="no step for"):
                engine.check_health()
            go_on.set()
            await running
            engine.check_health()

    asyncio.run(play())


def test_a_dead_loop_is_seen_and_ends_its_requests() -> None:
    async def play() -> None:
        async with running_engine() as engine:
            engine.check_health()
            asked = request("a", PROMPTS[0], max_tokens=400)
            async with aclosing(engine.generate(asked)) as outputs:
                await anext(outputs)
                engine._batching._route = None  # type: ignore[assignment]
                with pytest.raises(ServingError):
                    async for _ in outputs:
                        pass
            with pytest.raises(ServingError, match="dead"):
                engine.check_health()
            with pytest.raises(ServingError):
                await tokens(engine, request("b", PROMPTS[0]))

    asyncio.run(play())


def test_a_dedicated_engine_serves_one_adapter_and_gives_the_base_back_bitwise(
    expected: dict[tuple[AdapterKey | None, int], list[int]],
) -> None:
    hot, other = list(adapters())[3], next(iter(adapters()))
    before = {name: value.clone() for name, value in base().state_dict().items()}

    async def play() -> None:
        async with running_engine() as engine:
            early = asyncio.create_task(
                tokens(engine, request("early", PROMPTS[0], other, max_tokens=NUM_TOKENS))
            )
            await asyncio.sleep(0)
            await engine.dedicate(hot)
            assert early.done()  # it had begun: the switch waited for it
            assert early.result() == expected[other, 0]
            for place, prompt in enumerate(PROMPTS):
                asked = request(f"hot-{place}", prompt, hot, max_tokens=NUM_TOKENS)
                assert await tokens(engine, asked) == expected[hot, place]
            on_device = [
                resident.key for resident in engine.residents() if resident.tier == "device"
            ]
            assert hot not in on_device
            for refused in (other, None):
                with pytest.raises(ServingError, match="dedicated to"):
                    await tokens(engine, request("refused", PROMPTS[0], refused))
            with pytest.raises(ServingError, match="end that first"):
                await engine.dedicate(other)
            await engine.end_dedication()
            after = engine._model.state_dict()
            assert all(torch.equal(value, after[name]) for name, value in before.items())
            asked = request("late", PROMPTS[0], max_tokens=NUM_TOKENS)
            assert await tokens(engine, asked) == expected[None, 0]

    asyncio.run(play())


def test_stopping_finishes_what_runs_and_takes_no_more() -> None:
    async def play() -> None:
        async with running_engine() as engine:
            running = asyncio.create_task(tokens(engine, request("a", PROMPTS[0], max_tokens=30)))
            while engine.stats().num_steps == 0:
                await asyncio.sleep(0.001)
            await asyncio.to_thread(engine.stop, 20.0)
            assert len(await running) == 30
            with pytest.raises(ServingError):
                await tokens(engine, request("b", PROMPTS[0]))

    asyncio.run(play())


def test_stopping_fails_what_takes_too_long() -> None:
    async def play() -> None:
        async with running_engine() as engine:
            running = asyncio.create_task(tokens(engine, request("a", PROMPTS[0], max_tokens=450)))
            while engine.stats().num_steps == 0:
                await asyncio.sleep(0.001)
            await asyncio.to_thread(engine.stop, 0.0)
            with pytest.raises(ServingError):
                await running

    asyncio.run(play())


def test_a_failing_grammar_ends_its_own_request_alone() -> None:
    async def play() -> None:
        async with running_engine() as engine:
            other = asyncio.create_task(tokens(engine, request("a", PROMPTS[0], max_tokens=30)))
            asked = request("json", PROMPTS[0], json_schema={"type": "object"}, max_tokens=30)
            async with aclosing(engine.generate(asked)) as outputs:
                await anext(outputs)
                sampler = engine._running["json"].sampler
                assert sampler.grammar is not None
                sampler.grammar._matcher.consume_token(2)  # an end where none may be
                with pytest.raises(ServingError, match="json_schema"):
                    async for _ in outputs:
                        pass
            assert len(await other) == 30
            engine.check_health()

    asyncio.run(play())


def test_the_base_is_left_bitwise() -> None:
    before = {name: value.clone() for name, value in base().state_dict().items()}

    async def play() -> None:
        async with running_engine() as engine:
            await asyncio.gather(
                *(tokens(engine, request(str(key), PROMPTS[0], key)) for key in adapters())
            )
            after = engine._model.state_dict()
            assert all(torch.equal(value, after[name]) for name, value in before.items())

    asyncio.run(play())
