"""A service without Ray and without a model: the seams around the HTTP side."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from s2ft_ray.accounts import Principal, Tenant
from s2ft_ray.bases import load_tokenizer
from s2ft_ray.config import ModelConfig
from s2ft_ray.registry import AliasMove, ModelRef
from s2ft_ray.serving.catalog import Catalog, CatalogModel
from s2ft_ray.serving.generation import Generator
from s2ft_ray.serving.prompts import Limits
from s2ft_ray.serving.requests import AdapterKey, GenerationRequest, PromptLogprob, TokenOutput
from s2ft_ray.serving.routes import Route, ServedRequest
from s2ft_ray.serving.service import ReplicaLostError
from s2ft_ray.serving.templates import TemplateRenderer
from s2ft_ray.serving.wire_errors import ApiError

BASE = "s2ft://tiny"
TOKENIZER = load_tokenizer(ModelConfig())
RENDERER = TemplateRenderer()


class Silent:
    """Counts nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


class Ledger:
    """Keeps how each request ended."""

    def __init__(self) -> None:
        self.ends: list[tuple[str, str, str, int]] = []

    def ended(self, tags: dict[str, str], status: int, _seconds: float) -> None:
        self.ends.append((tags["tenant"], tags["model"], tags["version"], status))

    def running(self, count: int) -> None: ...

    def retried(self) -> None: ...


class Parrot:
    """An engine that says `text` whatever it is asked, token by token."""

    def __init__(self, text: str = "one two three") -> None:
        self.ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
        self.requests: list[GenerationRequest] = []
        self.scored_for: list[str | None] = []
        self.num_closed_early = 0
        self.pause_s = 0.0

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenOutput]:
        self.requests.append(request)
        ids = [*self.ids, TOKENIZER.eos_token_id][: request.params.max_tokens]
        is_over = False
        try:
            for place, token in enumerate(ids):
                await asyncio.sleep(self.pause_s)
                reason = None
                if place == len(ids) - 1:
                    reason = "stop" if token == TOKENIZER.eos_token_id else "length"
                    is_over = True
                top = tuple((token + i, -0.5 - i) for i in range(request.params.logprobs or 0))
                yield TokenOutput(token, -0.5, top, reason)
        finally:
            self.num_closed_early += not is_over

    async def score(
        self,
        prompt_ids: Sequence[int],
        adapter: AdapterKey | None = None,  # noqa: ARG002 - one parrot for all
        top_logprobs: int = 0,
        tenant: str | None = None,
    ) -> list[PromptLogprob]:
        self.scored_for.append(tenant)
        top = tuple((i, -1.0) for i in range(top_logprobs))
        return [
            PromptLogprob(i, -1.0 if place else None, top) for place, i in enumerate(prompt_ids)
        ]


class FakeBase:
    """A base's replicas: a generator over a parrot, which may die `deaths` times."""

    def __init__(self, engine: Parrot, deaths: int = 0, dies_after: int = 0) -> None:
        limits = Limits(context_tokens=512, output_tokens=256, vocab_size=len(TOKENIZER))
        self.generator = Generator(engine, TOKENIZER, limits, Silent(), RENDERER.render)
        self.is_stuck = False
        self.deaths = deaths
        self.dies_after = dies_after

    async def answer(self, served: ServedRequest) -> AsyncGenerator[str | ApiError]:
        if not self.dies_after:
            self._die()
        try:
            count = 0
            async for text in self.generator.answer(served):
                yield text
                count += 1
                if count == self.dies_after:
                    self._die()
        except ApiError as error:
            yield error

    async def ping(self) -> None:
        if self.is_stuck:
            raise RuntimeError("the engine is stuck")

    async def adapters(self) -> list[dict[str, Any]]:
        return [{"name": "acme.bot", "version": 1}]

    def _die(self) -> None:
        if self.deaths:
            self.deaths -= 1
            raise ReplicaLostError("killed")


class FakeWatcher:
    """A catalog that a test sets."""

    def __init__(self, catalog: Catalog) -> None:
        self.current = catalog
        self.versions: dict[ModelRef, Route | str | ApiError] = {}
        self.moves: list[tuple[Any, ...]] = []
        self.num_wakes = 0
        self.find_s = 0.0

    async def catalog(self, after: tuple[str, int]) -> Catalog:
        while self.current.revision == after:
            await asyncio.sleep(0.005)
        return self.current

    async def find(self, ref: ModelRef) -> Route | str | ApiError:
        await asyncio.sleep(self.find_s)
        return self.versions.get(ref, "it has no such version")

    async def promote(self, name: str, version: int, alias: str) -> AliasMove | ApiError:
        self.moves.append((name, version, alias))
        return AliasMove(name, alias, version, 1)

    async def place(self, name: str, alias: str, placement: str | None) -> ApiError | None:
        if name.startswith("acme."):
            self.moves.append((name, alias, placement))
            return None
        return ApiError(400, f"no adapter is registered as {name}")

    async def wake(self) -> None:
        self.num_wakes += 1

    async def rollback(self, name: str, alias: str) -> AliasMove | ApiError:
        return ApiError(400, f"{name}@{alias} was no other version before")


class FakeAccounts:
    """Keys that read like their owner: ``key-acme``, ``key-operator``."""

    def __init__(self, **limits: int) -> None:
        self.limits = limits
        self.revoked: set[str] = set()

    def authenticate(self, secret: str) -> Principal | None:
        if secret in self.revoked:
            return None
        owner = secret.removeprefix("key-")
        if owner == "operator":
            return Principal("k0", None, True)
        return Principal("k1", owner, False) if owner in ("acme", "globex") else None

    def tenant(self, name: str) -> Tenant:
        return Tenant(name=name, **self.limits)


def adapter_route(name: str, version: int = 1) -> Route:
    """Return the route to a version of an adapter."""
    fingerprint = f"{name}-{version}"
    return Route(BASE, fingerprint, AdapterKey(name, str(version), fingerprint))


def make_catalog(*models: CatalogModel, **changes: Any) -> Catalog:
    """Return a catalog with the embedded base and `models`."""
    facts: dict[str, Any] = {
        "revision": ("w", 1),
        "is_ready": True,
        "bases": {BASE: Route(BASE, "base-fingerprint")},
        "models": {model.name: model for model in models},
    }
    return Catalog(**(facts | changes))
