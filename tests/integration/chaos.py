"""What is done to a service under load, and what must come of it: see ``serving_chaos.py``."""

import operator
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence

from served_node import PARTS, PROMPTS, Load, Service

FAULTS = (
    "replica",
    "ingress",
    "proxy",
    "controller",
    "watcher",
    "registry",
    "promotion",
    "departures",
    "unread",
)
BREAKING = {"replica", "ingress", "proxy"}
"""What may cut a stream."""
ASKED = (
    ("initech", "initech.served"),
    ("globex", "globex.served"),
    ("initech", "initech.swapped"),
)
VERSIONS = ("initech.served:1", "globex.served:1", "initech.swapped:1", "initech.swapped:2")
ANSWERS_A_CLIENT = 5
CONNECTION_ERRORS = ("APIConnectionError", "RemoteProtocolError", "ReadError", "ConnectError")
"""What a client sees of a proxy that dies."""
CUTS = (*CONNECTION_ERRORS, "InternalServerError", "EOFError")
"""And of an ingress: Serve's own error, or a stream that ends without an event."""
UNREAD_S = 10.0
LATEST_S = 5.0
"""A fault comes so long after a round's begin at most."""


class Chaos:
    """A service under load, what is done to it, and what came of it."""

    def __init__(self, service: Service, load: Load, rng: random.Random) -> None:
        self.service, self.load, self.rng = service, load, rng
        self.done: Counter[str] = Counter()
        self.pauses: dict[str, float] = {}
        """The longest time without an answer in a round, by fault."""
        self._num_answers = self._num_broken = 0  # that were looked at
        self._faults: list[str] = []  # of this round

    def round(self, number: int, faults: list[str]) -> list[str]:
        """Disturb, wait until all is as before; return what is wrong."""
        started, answers, broken = time.monotonic(), self._num_answers, self._num_broken
        failed: list[str] = []
        self._faults = faults
        timers = []
        for fault in faults:
            timer = threading.Timer(self.rng.uniform(0, LATEST_S), self._do, (fault, failed))
            timer.start()
            timers.append(timer)
        pause = self._longest_pause(timers)
        wrong = [*failed, *self.check(faults)]
        for fault in faults:
            self.done[fault] += 1
            self.pauses[fault] = max(self.pauses.get(fault, 0.0), pause)
        print(
            f"round {number}: {', '.join(faults)}, {time.monotonic() - started:.0f} s,"
            f" {self._num_answers - answers} answers, {self._num_broken - broken} broke off,"
            f" longest pause {pause:.1f} s, {wrong or 'right'}",
            flush=True,
        )
        return wrong

    def _longest_pause(self, timers: list[threading.Timer]) -> float:
        """Wait for the faults, and then for new answers of every client; return the longest time
        without any answer."""
        longest, last, count = 0.0, time.monotonic(), sum(self.load.counts)
        wanted: list[int] | None = None
        deadline = last + 300.0
        while wanted is None or any(map(operator.lt, self.load.counts, wanted)):
            assert time.monotonic() < deadline, f"no answers any more\n{self.service.logs()}"
            if (now := sum(self.load.counts)) > count:
                count, last = now, time.monotonic()
            longest = max(longest, time.monotonic() - last)
            if wanted is None and not any(timer.is_alive() for timer in timers):
                wanted = [count + ANSWERS_A_CLIENT for count in self.load.counts]
            time.sleep(0.05)
        return longest

    def check(self, faults: Sequence[str] = ()) -> list[str]:
        """Hold what is new against the merged model's answers; return what is wrong."""
        by_fingerprint = {self.service.adapters[it].fingerprint: it for it in VERSIONS}
        answers, broken = self.load.answers[:], self.load.broken[:]
        wrong = []
        for prompt, fingerprint, text in answers[self._num_answers :]:
            version = by_fingerprint.get(fingerprint)
            if version is None or text != self.service.expected(version, prompt):
                wrong.append(f"{prompt!r} to {version or fingerprint}: {text!r}")
        for prompt, text, error in broken[self._num_broken :]:
            if not any(self.service.expected(it, prompt).startswith(text) for it in VERSIONS):
                wrong.append(f"{prompt!r} broke off wrongly: {text!r}, {error}")
            begun = "replica" in faults and text and "died in the middle" in error
            hung = "proxy" in faults and error.startswith(CONNECTION_ERRORS)
            cut = "ingress" in faults and error.startswith(CUTS)
            if not (begun or hung or cut):
                wrong.append(f"{prompt!r} broke off after {text!r}: {error}")
        self._num_answers, self._num_broken = len(answers), len(broken)
        return wrong

    def _do(self, fault: str, failed: list[str]) -> None:
        try:
            getattr(self, f"_{fault}")()
        except Exception as error:  # noqa: BLE001 - told as what is wrong in this round
            failed.append(f"{fault}: {type(error).__name__}: {error}")

    def _replica(self) -> None:
        self._kill("a base's replica")

    def _ingress(self) -> None:
        self._kill("the ingress")

    def _proxy(self) -> None:
        self._kill("the proxy")

    def _controller(self) -> None:
        self._kill("the controller")

    def _watcher(self) -> None:
        self._kill("the watcher")

    def _kill(self, part: str) -> None:
        # it may just be coming back from the last round
        self.service.wait_until(lambda: bool(self.service.processes(PARTS[part])), 60)
        self.service.kill(part)

    def _registry(self) -> None:
        self.service.kill_registry()
        time.sleep(self.rng.uniform(1.0, 10.0))
        self.service.s2ft("up")

    def _promotion(self) -> None:
        """Make the other version the champion, and wait for it."""
        live = {fingerprint for _, fingerprint, _ in self.load.answers[-40:]}
        version = 1 if self.service.adapters["initech.swapped:2"].fingerprint in live else 2
        self.service.s2ft("promote", "initech.swapped", str(version))
        wanted = self.service.adapters[f"initech.swapped:{version}"].fingerprint
        self.service.wait_until(
            lambda: wanted in {fingerprint for _, fingerprint, _ in self.load.answers[-40:]}, 120
        )

    def _departures(self) -> None:
        """Begin streams that nobody reads to their end."""
        for _ in range(8):
            with self.service.passing_client("globex", retries=5) as client:
                stream = client.completions.create(
                    model="globex.served",
                    prompt=self.rng.choice(PROMPTS),
                    max_tokens=400,
                    temperature=0,
                    stream=True,
                )
                next(iter(stream))
                stream.close()

    def _unread(self) -> None:
        """Keep streams open and unread for a while; then they are to be whole."""
        prompt = self.rng.choice(PROMPTS)
        texts, ended = [""] * 8, set()
        with self.service.passing_client("globex", retries=5) as client:
            try:
                stream = client.completions.create(
                    model="globex.served",
                    prompt=prompt,
                    n=len(texts),
                    max_tokens=400,
                    temperature=0,
                    stream=True,
                )
                time.sleep(UNREAD_S)
                for chunk in stream:
                    (choice,) = chunk.choices
                    texts[choice.index] += choice.text
                    if choice.finish_reason:
                        ended.add(choice.index)
            except Exception:
                if not BREAKING & set(self._faults):
                    raise
        begun = self.service.expected("globex.served:1", prompt).rstrip("\ufffd")
        assert all(text.startswith(begun) or begun.startswith(text) for text in texts), texts
        assert len(ended) == len(texts) or BREAKING & set(self._faults), f"only {ended} ended"
