"""From alias to traffic: what becomes live, what never does, what stays; the canary."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from method_models import build_model
from serving_fakes import BASE

from s2ft_ray.accounts import Principal
from s2ft_ray.config import S2FTConfig
from s2ft_ray.errors import AdapterError, JobError, ServingError
from s2ft_ray.method import Adapter, base_fingerprint, convert, extract_adapter, slice_layers
from s2ft_ray.registry import REJECTED_TAG, AliasedModel, ModelRef, ResolvedAdapter
from s2ft_ray.serving import canary as canary_module
from s2ft_ray.serving import watcher as watching
from s2ft_ray.serving.canary import Canary
from s2ft_ray.serving.requests import AdapterKey, PromptLogprob
from s2ft_ray.serving.routes import Route
from s2ft_ray.serving.watcher import RejectedError, Watcher
from s2ft_ray.serving.wire_errors import ApiError

NAME = "acme.bot"
UNEXPECTED = 13
"""A version of which the registry says something that nobody foresaw."""
ACME = Principal("k", "acme", False)


class Replica:
    """A base's replica that finds fault with what a test says."""

    def __init__(self, base_id: str = BASE, fingerprint: str = "base-f") -> None:
        self.route = Route(base_id, fingerprint)
        self.is_up = asyncio.Event()
        self.is_up.set()
        self.hangs_on: str | None = None
        self.faults: dict[str, str] = {}
        self.checked: list[str] = []
        self.released: list[AdapterKey] = []
        self.error: Exception | None = None

    async def describe(self) -> Route:
        await self.is_up.wait()
        return self.route

    async def check(self, route: Route) -> str | None:
        if self.error is not None:
            raise self.error
        if str(route.adapter) == self.hangs_on:
            await asyncio.Event().wait()
        self.checked.append(str(route.adapter))
        return self.faults.get(str(route.adapter))

    async def release(self, key: AdapterKey) -> None:
        self.released.append(key)


class Registry:
    """MLflow as a test wants it: models by alias, versions with their base."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.aliases: dict[str, int] = {}
        self.served: dict[str, int] = {}
        self.shared: frozenset[str] = frozenset()
        self.placements: dict[str, str] = {}
        self.bases: dict[int, str] = {}
        self.is_away = False
        self.others: list[AliasedModel] = []
        self.notes: list[tuple[Any, ...]] = []
        self.accepted: list[tuple[str, int]] = []
        self.marked: set[int] = set()
        """Versions with the tag of a rejection."""
        document = {"training": {"data": {"chat_template": "{{ x }}"}}}
        (folder / "adapter_config.json").write_text(json.dumps(document))

    def list_models(self, _uri: str) -> list[AliasedModel]:
        if self.is_away:
            raise JobError("MLflow is away")
        return [
            AliasedModel(NAME, dict(self.aliases), dict(self.served), self.shared, self.placements),
            *self.others,
        ]

    def resolve_adapter(self, ref: str, _uri: str) -> ResolvedAdapter:
        version = int(ref.rpartition(":")[2])
        if version > 50:
            raise AdapterError(f"{ref}: there is none")
        if version == UNEXPECTED:
            raise KeyError("python_function")
        tags = {"base": "some-base", "base_fingerprint": self.bases.get(version, "base-f")}
        if version in self.marked:
            tags[REJECTED_TAG] = "canary: off"
        return ResolvedAdapter(NAME, version, None, f"f{version}", self.folder, tags)

    def accept(self, name: str, version: int, _uri: str) -> None:
        self.accepted.append((name, version))
        self.marked.discard(version)

    def note(self, *facts: Any) -> None:
        self.notes.append(facts[:-1])


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    registry = Registry(tmp_path)
    monkeypatch.setattr(watching, "list_models", registry.list_models)
    monkeypatch.setattr(watching, "resolve_adapter", registry.resolve_adapter)
    monkeypatch.setattr(watching, "note_served", registry.note)
    monkeypatch.setattr(watching, "note_rejected", registry.note)
    monkeypatch.setattr(watching, "note_accepted", registry.accept)
    monkeypatch.setattr(watching, "_RELEASE_AFTER_S", 0.01)
    return registry


def follow(story: Callable[[Watcher, Replica], Awaitable[None]]) -> None:
    async def run() -> None:
        replica = Replica()
        await story(Watcher({BASE: replica}, "sqlite://", 0.01), replica)

    asyncio.run(run())


async def live(watcher: Watcher, name: str = NAME) -> Route:
    catalog = await watcher.catalog(("", 0))
    found = catalog.resolve(name, ACME)
    assert isinstance(found, Route)
    return found


def test_a_version_is_live_once_it_was_checked(registry: Registry) -> None:
    registry.aliases = {"champion": 1, "candidate": 2}

    async def story(watcher: Watcher, replica: Replica) -> None:
        await watcher.look()
        assert sorted(replica.checked) == [f"{NAME}:1", f"{NAME}:2"]
        route = await live(watcher)
        assert route.adapter == AdapterKey(NAME, "1", "f1")
        assert route.chat_template == "{{ x }}"
        assert (await live(watcher, f"{NAME}@candidate")).fingerprint == "f2"
        assert (NAME, "champion", 1) in registry.notes
        await watcher.look()
        assert len(replica.checked) == 2

    follow(story)


def test_a_new_version_takes_over_and_the_old_one_is_released(registry: Registry) -> None:
    registry.aliases = {"champion": 1}

    async def story(watcher: Watcher, replica: Replica) -> None:
        await watcher.look()
        before = await watcher.catalog(("", 0))
        registry.aliases = {"champion": 2}
        await watcher.look()
        assert (await live(watcher)).fingerprint == "f2"
        assert before.models[NAME].live["champion"].fingerprint == "f1"  # who holds it keeps it
        await asyncio.sleep(0.05)
        assert replica.released == [AdapterKey(NAME, "1", "f1")]

    follow(story)


def test_a_version_with_a_fault_leaves_the_last_good_one_live(registry: Registry) -> None:
    registry.aliases = {"champion": 1}

    async def story(watcher: Watcher, replica: Replica) -> None:
        await watcher.look()
        replica.faults[f"{NAME}:2"] = "canary: off"
        registry.aliases = {"champion": 2}
        await watcher.look()
        await watcher.look()
        assert (await live(watcher)).fingerprint == "f1"
        assert replica.checked.count(f"{NAME}:2") == 1
        assert (NAME, 2, "canary: off") in registry.notes
        with pytest.raises(RejectedError, match="canary: off"):
            await watcher.find(ModelRef(NAME, version=2))

    follow(story)


def test_a_version_that_passes_after_all_is_no_longer_marked(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "_REJECTED_S", 0.0)
    registry.aliases = {"champion": 1, "candidate": 2, "trial": 3}
    registry.marked = {3}  # by a watcher that was here before

    async def story(watcher: Watcher, replica: Replica) -> None:
        replica.faults = {f"{NAME}:1": "canary: off"}
        await watcher.look()
        assert registry.accepted == [(NAME, 3)]
        replica.faults = {}
        await watcher.look()
        await watcher.look()
        assert registry.accepted == [(NAME, 3), (NAME, 1)]

    follow(story)


def test_a_check_that_has_no_memory_is_told_in_the_catalog(registry: Registry) -> None:
    registry.aliases = {"champion": 1}

    async def story(watcher: Watcher, replica: Replica) -> None:
        error = RuntimeError("a traceback")  # as Ray wraps what a replica raises
        error.cause = ServingError("no memory for its check")  # type: ignore[attr-defined]
        replica.error = error
        await watcher.look()
        with pytest.raises(ApiError, match=r"checked now: no memory for its check$") as refused:
            await live(watcher)
        assert refused.value.status == 503

    follow(story)


def test_a_restarted_watcher_falls_back_to_what_was_served(registry: Registry) -> None:
    registry.aliases, registry.served = {"champion": 2}, {"champion": 1}

    async def story(watcher: Watcher, replica: Replica) -> None:
        replica.faults[f"{NAME}:2"] = "canary: off"
        await watcher.look()
        assert (await live(watcher)).fingerprint == "f1"

    follow(story)


def test_a_first_version_with_a_fault_is_told_and_not_served(registry: Registry) -> None:
    registry.aliases = {"champion": 1}
    registry.bases = {1: "another-base"}

    async def story(watcher: Watcher, replica: Replica) -> None:
        await watcher.look()
        with pytest.raises(ApiError, match="some-base isn't served here"):
            await live(watcher)
        assert replica.checked == []

    follow(story)


def test_a_model_that_cant_be_looked_at_holds_up_no_other(registry: Registry) -> None:
    registry.aliases = {"champion": 1}
    registry.others = [AliasedModel("acme.odd", {"champion": UNEXPECTED}, {}, frozenset())]

    async def story(watcher: Watcher, _replica: Replica) -> None:
        await watcher.look()
        assert (await live(watcher)).fingerprint == "f1"
        assert (await watcher.catalog(("", 0))).is_ready
        registry.aliases = {"champion": 2}
        await watcher.look()
        assert (await live(watcher)).fingerprint == "f2"

    follow(story)


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_version_without_its_description_is_refused_by_name(
    registry: Registry, text: str | None
) -> None:
    registry.aliases = {"champion": 1}
    path = registry.folder / "adapter_config.json"
    path.unlink() if text is None else path.write_text(text)

    async def story(watcher: Watcher, _replica: Replica) -> None:
        await watcher.look()
        with pytest.raises(ApiError, match="missing or damaged"):
            await live(watcher)
        with pytest.raises(AdapterError, match="missing or damaged"):
            await watcher.find(ModelRef(NAME, version=1))

    follow(story)


def test_a_dead_replica_is_no_fault_of_the_version(registry: Registry) -> None:
    registry.aliases = {"champion": 1}

    async def story(watcher: Watcher, replica: Replica) -> None:
        replica.error = RuntimeError("the actor died")
        await watcher.look()
        with pytest.raises(ApiError, match="can't be checked now") as refused:
            await live(watcher)
        assert refused.value.status == 503
        replica.error = None
        await watcher.look()
        assert (await live(watcher)).fingerprint == "f1"

    follow(story)


def test_a_base_that_is_not_up_holds_up_no_other(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "_DESCRIBE_TIMEOUT_S", 0.01)
    registry.aliases = {"champion": 1, "candidate": 2}
    registry.bases = {2: "big-f"}

    async def run() -> None:
        here, later = Replica(), Replica("big", "big-f")
        later.is_up.clear()
        watcher = Watcher({BASE: here, "big": later}, "sqlite://", 0.01)
        await watcher.look()
        assert (await live(watcher)).fingerprint == "f1"
        with pytest.raises(ApiError):
            await live(watcher, f"{NAME}@candidate")
        assert not any(2 in note for note in registry.notes)  # it isn't rejected: it is waited for
        later.is_up.set()
        await watcher.look()
        assert (await live(watcher, f"{NAME}@candidate")).base_id == "big"

    asyncio.run(run())


def test_a_check_that_hangs_holds_up_nobody_for_long(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "_CHECK_TIMEOUT_S", 0.01)
    registry.aliases = {"champion": 1, "candidate": 2}

    async def story(watcher: Watcher, replica: Replica) -> None:
        replica.hangs_on = f"{NAME}:2"
        await watcher.look()
        assert (await live(watcher)).fingerprint == "f1"
        replica.hangs_on = None
        await watcher.look()
        assert (await live(watcher, f"{NAME}@candidate")).fingerprint == "f2"

    follow(story)


def test_who_knows_of_a_change_makes_it_look_at_once(registry: Registry) -> None:
    async def run() -> None:
        watcher = Watcher({BASE: Replica()}, "sqlite://", 60.0)
        following = asyncio.create_task(watcher.run())
        first = await watcher.catalog(("", 0))
        while not first.is_ready:
            first = await watcher.catalog(first.revision)
        registry.aliases = {"champion": 1}
        watcher.wake()
        async with asyncio.timeout(5):
            while "champion" not in (await watcher.catalog(first.revision)).models[NAME].live:
                await asyncio.sleep(0.01)
        following.cancel()

    asyncio.run(run())


def test_placements_are_in_the_catalog(registry: Registry) -> None:
    registry.aliases, registry.placements = {"champion": 1}, {"champion": "pinned", "gone": "warm"}

    async def story(watcher: Watcher, _: Replica) -> None:
        await watcher.look()
        placed = (await watcher.catalog(("", 0))).placed(BASE)
        assert {str(key): how for key, (_, how) in placed.items()} == {f"{NAME}:1": "pinned"}

    follow(story)


def test_without_the_registry_what_is_live_stays(registry: Registry) -> None:
    registry.aliases = {"champion": 1}

    async def story(watcher: Watcher, _: Replica) -> None:
        registry.is_away = True
        await watcher.look()
        catalog = await watcher.catalog(("", 0))
        assert (catalog.is_ready, catalog.problem) == (False, "MLflow is away")
        registry.is_away = False
        await watcher.look()
        registry.is_away = True
        await watcher.look()
        catalog = await watcher.catalog(("", 0))
        assert catalog.problem == "MLflow is away"
        assert (await live(watcher)).fingerprint == "f1"

    follow(story)


def test_a_removed_alias_is_gone(registry: Registry) -> None:
    registry.aliases = {"champion": 1, "old": 1}

    async def story(watcher: Watcher, replica: Replica) -> None:
        await watcher.look()
        del registry.aliases["old"]
        registry.shared = frozenset({"globex"})
        await watcher.look()
        with pytest.raises(ApiError, match="no alias old, there is champion"):
            await live(watcher, f"{NAME}@old")
        catalog = await watcher.catalog(("", 0))
        assert catalog.models[NAME].is_visible_to(Principal("k", "globex", False))
        await asyncio.sleep(0.05)
        assert replica.released == []  # champion is the same version

    follow(story)


def test_versions_that_no_alias_names_are_found_when_asked_for(registry: Registry) -> None:
    registry.aliases = {"champion": 1}

    async def story(watcher: Watcher, replica: Replica) -> None:
        await watcher.look()
        for _ in range(2):
            assert (await watcher.find(ModelRef(NAME, version=7))).fingerprint == "f7"
        assert replica.checked.count(f"{NAME}:7") == 1
        with pytest.raises(AdapterError, match="there is none"):
            await watcher.find(ModelRef(NAME, version=99))

    follow(story)


def make_adapter(seed: int) -> Adapter:
    model = build_model()
    convert(model, S2FTConfig(budgets={"o": 0.25, "down": 0.1}, seed=seed))
    with torch.no_grad():
        for _, layer in slice_layers(model):
            layer.slice += 0.3 * torch.randn_like(layer.slice)
            layer.write_back()
    return extract_adapter(model)


def test_the_canarys_reference_is_the_merged_model_and_leaves_the_base_alone() -> None:
    torch.manual_seed(0)
    adapter, model = make_adapter(1), build_model()
    before = base_fingerprint(model)
    canary = Canary(model)
    told = canary.logprobs(adapter)
    assert base_fingerprint(model) == before
    assert canary.logprobs(make_adapter(2)) != told
    adapter.switch_into(model)
    ids = torch.tensor([canary.prompt_ids])
    logits = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    wanted = logits.gather(1, ids[0, 1:, None])[:, 0].tolist()
    assert told == pytest.approx(wanted, abs=1e-5)


def test_a_check_takes_one_modules_memory_at_most() -> None:
    adapter, model = make_adapter(1), build_model()
    shared = {parameter.data_ptr() for parameter in model.parameters()}
    canary = Canary(model)
    copied: list[int] = []

    def measure(*_: object) -> None:
        own = [it for it in canary._model.parameters() if it.data_ptr() not in shared]
        copied.append(sum(it.nbytes for it in own))

    for module in canary._model.modules():
        module.register_forward_pre_hook(measure)
        module.register_forward_hook(measure)
    canary.logprobs(adapter)
    weights = [model.get_submodule(path).weight for path in adapter.slices]
    assert 0 < max(copied) <= max(weight.nbytes for weight in weights)  # type: ignore[operator,union-attr,type-var]
    measure()
    assert copied[-1] == 0


def test_a_check_without_memory_is_no_fault_of_the_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    canary = Canary(build_model())
    wanted = canary.logprobs(make_adapter(1))
    with monkeypatch.context() as patch:
        patch.setattr(canary_module, "_merge", fail)
        with pytest.raises(ServingError, match="no memory for its check"):
            canary.logprobs(make_adapter(1))
    assert canary.logprobs(make_adapter(1)) == wanted


def test_a_canary_that_is_off_is_told() -> None:
    canary = Canary(build_model())
    served = [PromptLogprob(1, None), PromptLogprob(2, -1.0), PromptLogprob(3, -2.0)]
    canary.compare(served, [-1.001, -2.0])
    with pytest.raises(AdapterError, match=r"token 2 has logprob -2\.0"):
        canary.compare(served, [-1.0, -2.1])
    with pytest.raises(AdapterError, match="canary"):
        canary.compare([PromptLogprob(1, None), PromptLogprob(2, float("nan"))], [-1.0])
