"""Two tenants and the base asked at once through the OpenAI SDK, then a version promoted live.

    python jobs/ask.py --acme KEY --globex KEY [--url http://127.0.0.1:8000/v1]

What `make demo` ends with. A client like any other: it knows the endpoint and two keys.
"""

import argparse
import asyncio
import itertools
import sys
import time
from collections import Counter
from typing import Any

import openai

MESSAGE = "The speaker I got is noisy, my order is 8675. Please help."
SECONDS_BEFORE, SECONDS_AFTER = 2.0, 2.0
NUM_CLIENTS = 4
PAUSE_S = 0.1  # of each client between two questions: two cores serve and ask


async def main() -> int:
    """Ask, promote, and tell what came; 1 where a request failed or the promotion didn't show."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--acme", required=True, help="a key of the tenant acme")
    parser.add_argument("--globex", required=True, help="a key of the tenant globex")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    args = parser.parse_args()
    acme = openai.AsyncOpenAI(base_url=args.url, api_key=args.acme)
    globex = openai.AsyncOpenAI(base_url=args.url, api_key=args.globex)
    await until_listed(acme, "acme.support-bot@candidate")
    await until_listed(globex, "globex.desk")
    await ask_at_once({"acme.support-bot": acme, "globex.desk": globex, "s2ft://tiny": acme})
    return await promote_live(acme)


async def until_listed(client: openai.AsyncOpenAI, model: str) -> None:
    """Wait until the service has checked a version and lists it."""
    for _ in range(300):
        try:
            if model in [listed.id async for listed in client.models.list()]:
                return
        except openai.InternalServerError:  # before the first pass over the registry
            pass
        await asyncio.sleep(0.2)
    raise SystemExit(f"{model} is not served after a minute; s2ft adapters list tells what is")


async def ask_at_once(clients: dict[str, openai.AsyncOpenAI]) -> None:
    """Stream an answer of each model at the same time, and tell how their tokens came."""
    arrivals: list[str] = []

    async def stream(model: str, client: openai.AsyncOpenAI) -> str:
        text = ""
        chunks = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": MESSAGE}],
            temperature=0,
            max_tokens=24,
            stream=True,
        )
        async for chunk in chunks:
            if piece := chunk.choices[0].delta.content:
                text += piece
                arrivals.append(model)
        return text

    answers = await asyncio.gather(*(stream(*pair) for pair in clients.items()))
    print(f"asked              {MESSAGE}")
    for model, answer in zip(clients, answers, strict=True):
        print(f"{model:<18} {answer}")
    turns = sum(before != after for before, after in itertools.pairwise(arrivals))
    print(f"{len(arrivals)} pieces of text came; {turns} were of another model than the one before")


async def promote_live(client: openai.AsyncOpenAI) -> int:
    """Promote version 2 while clients ask all the time; count who answered them."""
    answers: Counter[tuple[str, str]] = Counter()
    failures: list[openai.APIError] = []
    is_over = False

    async def ask() -> None:
        while not is_over:
            try:
                reply = await client.chat.completions.create(
                    model="acme.support-bot",
                    messages=[{"role": "user", "content": MESSAGE}],
                    temperature=0,
                    max_tokens=24,
                )
                text = reply.choices[0].message.content or ""
                answers[str(reply.system_fingerprint)[:12], text] += 1
            except openai.APIError as error:
                failures.append(error)
            await asyncio.sleep(PAUSE_S)

    clients = [asyncio.create_task(ask()) for _ in range(NUM_CLIENTS)]
    await asyncio.sleep(SECONDS_BEFORE)
    print(f"\npromoting version 2, with {NUM_CLIENTS} clients asking acme.support-bot all the time")
    started = time.monotonic()
    # what `s2ft promote` does, by the owner's own key
    await client.post(
        "/models/acme.support-bot/promote", cast_to=dict[str, Any], body={"version": 2}
    )
    while len(answers) < 2 and time.monotonic() - started < 60:
        await asyncio.sleep(0.05)
    print(f"version 2 answers {time.monotonic() - started:.1f} s later")
    await asyncio.sleep(SECONDS_AFTER)
    is_over = True
    await asyncio.gather(*clients)
    for (fingerprint, text), count in answers.items():
        print(f"{count:>4} answers by {fingerprint}: {text}")
    print(f"{len(failures)} failed")
    return 0 if len(answers) == 2 and not failures else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
