"""Adapters registered in a real MLflow, found again, and answering through its pyfunc flavour."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from registry_parts import (
    Server,
    make_database,
    make_home,
    register_and_die,
    run_config,
    save_base,
    train_adapter,
    write_points,
)

from s2ft_ray import cli
from s2ft_ray.bases import load_base_model, load_tokenizer
from s2ft_ray.config import ModelConfig, RunConfig
from s2ft_ray.data import encode_prompt
from s2ft_ray.errors import AdapterError, ConfigError, JobError
from s2ft_ray.method import Adapter
from s2ft_ray.registry import (
    RegisteredVersion,
    TrackedRun,
    forget_kept,
    register_adapter,
    resolve_adapter,
    resolve_parent,
)
from s2ft_ray.registry.pyfunc import AdapterModel, _load_pyfunc

NAME = "acme.support-bot"
# Of what a process that registers imports, the parts that take seconds.
PRELOAD = [
    "s2ft_ray.registry.versions",
    "transformers.models.llama.modeling_llama",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.store.model_registry.sqlalchemy_store",
]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_database(tmp_path_factory.mktemp("database"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def home(tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return make_home(tmp_path, database, monkeypatch)


@pytest.fixture
def server(home: Path) -> Iterator[Server]:
    server = Server(home)
    yield server
    server.kill()


def client_of(home: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{home / 'mlflow.db'}")


def finish_job(
    home: Path, base: Path, run: str, *, seed: int = 0, **sections: Any
) -> tuple[Path, RunConfig, str]:
    """Track a job up to its registration; return its adapter, config and MLflow run."""
    folder = home / "runs" / "acme" / "support-bot" / run
    folder.mkdir(parents=True)
    config = run_config(base, **sections)
    with TrackedRun.start(config, run_folder=folder, tags={"job": run}) as tracked:
        write_points(folder, range(1, 4))
        train_adapter(base, folder / "adapter", seed=seed)
        assert tracked.flush(60)
        assert tracked.run_id is not None
    return folder / "adapter", config, tracked.run_id


def register(home: Path, base: Path, run: str, **job: Any) -> RegisteredVersion:
    folder, config, run_id = finish_job(home, base, run, **job)
    return register_adapter(folder, config, mlflow_run_id=run_id)


def test_a_registered_adapter_is_a_small_logged_model_with_lineage(
    home: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, config, run_id = finish_job(home, base, "r1")
    version = register_adapter(
        folder,
        config,
        mlflow_run_id=run_id,
        tags={"parent": "acme.older", "parent_version": "4"},
        metrics={"eval_loss": 1.25},
    )
    adapter = Adapter.load(folder)
    assert version == RegisteredVersion(NAME, 1, "champion", adapter.fingerprint)

    client = client_of(home)
    stored = client.get_model_version_by_alias(NAME, "champion")
    expected = {
        "tenant": "acme",
        "base": str(base),
        "base_fingerprint": adapter.base.fingerprint,
        "fingerprint": adapter.fingerprint,
        "selection": "random",
        "parent": "acme.older",
        "parent_version": "4",
        "job": "r1",
    }
    assert expected.items() <= stored.tags.items()
    assert stored.run_id == run_id
    model = client.get_logged_model(client.get_run(run_id).outputs.model_outputs[0].model_id)
    assert model.status == "READY"
    assert model.source_run_id == run_id
    assert {metric.key: metric.value for metric in model.metrics} == {"final/eval_loss": 1.25}
    location = Path(model.artifact_location.removeprefix("file://"))
    files = [path for path in location.rglob("*") if path.is_file()]
    adapter_bytes = (folder / "adapter_model.safetensors").stat().st_size
    assert sum(path.stat().st_size for path in files) < adapter_bytes + 10_000
    monkeypatch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)
    signature = mlflow.models.get_model_info(f"models:/{NAME}@champion").signature
    assert signature.inputs.input_names() == ["prompt", "messages"]
    params = {spec.name: spec.default for spec in signature.params}
    assert params == {"max_new_tokens": 128, "temperature": 0.0, "seed": 0}


def test_a_reference_finds_the_version_it_names(home: Path, base: Path) -> None:
    register(home, base, "r1", seed=1)
    second = register(home, base, "r2", seed=2, registry={"alias": "blue"})
    champion, blue, first = (
        resolve_adapter(ref) for ref in (NAME, f"models:/{NAME}@blue", f"{NAME}:1")
    )
    assert (champion.version, champion.alias) == (1, "champion")
    assert (first.version, first.alias) == (1, None)
    assert (blue.version, blue.alias, blue.fingerprint) == (2, "blue", second.fingerprint)
    assert Adapter.load(blue.folder).fingerprint == second.fingerprint
    assert blue.tags["tenant"] == "acme"


def test_registered_adapters_are_inspected_fused_and_exported_by_name(
    home: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    register(home, base, "r1", seed=1)
    second = register(home, base, "r2", seed=2)
    assert cli.main(["inspect", f"{NAME}:2", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["name"], facts["version"]) == (NAME, 2)
    assert facts["fingerprint"] == second.fingerprint
    assert all(module["relative_norm"] > 0 for module in facts["modules"])
    fused, merged = home / "fused", home / "merged"
    assert cli.main(["fuse", f"{NAME}:1", f"{NAME}:2", "--out", str(fused)]) == 0
    assert cli.main(["export", str(fused), "--format", "merged", "--out", str(merged)]) == 0
    model = load_base_model(ModelConfig(name_or_path=str(base)))
    Adapter.load(fused).switch_into(model)
    expected = model.state_dict()
    found = load_base_model(ModelConfig(name_or_path=str(merged))).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert load_tokenizer(ModelConfig(name_or_path=str(merged))).chat_template is not None
    assert cli.main(["export", f"{NAME}:9", "--format", "peft", "--out", str(home / "no")]) == 2
    assert f"{NAME} has no version 9; it has 1, 2" in capsys.readouterr().err


def test_a_fused_adapter_becomes_a_version_once_and_takes_the_alias_each_time(
    home: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = register(home, base, "r1", seed=1)
    second = register(home, base, "r2", seed=2)
    parts = [f"{NAME}:1", f"{NAME}:2"]
    fused = home / "fused"
    assert cli.main(["fuse", *parts, "--weights", "0.5", "2", "--out", str(fused)]) == 0
    for _ in range(2):
        assert cli.main(["register", str(fused), NAME, "--alias", "blue"]) == 0
    made = f"{NAME}@blue is version 3, {Adapter.load(fused).fingerprint[:12]}\n"
    assert capsys.readouterr().out.endswith(made * 2)
    found = resolve_adapter(f"{NAME}@blue")
    assert found.version == 3
    assert found.tags["fused"] == (
        f"+0.5 x {first.fingerprint[:12]}, +2 x {second.fingerprint[:12]}"
    )
    assert resolve_adapter(NAME).version == 2
    model = _load_pyfunc(str(found.folder))
    assert len(model.predict(["x"], {"max_new_tokens": 4})) == 1

    # what is registered already is given the alias: here the champion's, by its folder
    assert cli.main(["register", str(resolve_adapter(NAME).folder), NAME, "--alias", "blue"]) == 0
    assert resolve_adapter(f"{NAME}@blue").version == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("{folder}", "bot"), "'bot' names no registered adapter; write <tenant>.<name>"),
        (("{folder}", NAME, "--alias", "v2"), "'v2' is reserved by MLflow"),
        (("{folder}/none", NAME), "none"),
    ],
)
def test_what_cant_be_registered_is_told(
    home: Path,
    base: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    told: str,
) -> None:
    train_adapter(base, home / "mine")
    done = cli.main(["register", *(it.format(folder=home / "mine") for it in arguments)])
    assert (done, told in capsys.readouterr().err) == (2, True)


@pytest.mark.parametrize(
    ("ref", "told"),
    [
        (f"{NAME}@green", f"{NAME} has no alias green; it has champion"),
        (f"{NAME}:7", f"{NAME} has no version 7; it has 1"),
        ("acme.bot", f"no adapter is registered as acme.bot; of acme there is {NAME}"),
        ("globex.bot", "no adapter is registered as globex.bot; of globex there is none"),
    ],
)
def test_an_unknown_reference_is_told_what_exists(
    home: Path, base: Path, ref: str, told: str
) -> None:
    register(home, base, "r1")
    with pytest.raises(AdapterError) as caught:
        resolve_adapter(ref)
    assert caught.value.faults == (f"{ref}: {told}",)


def test_registering_again_finds_the_version(home: Path, base: Path) -> None:
    folder, config, run_id = finish_job(home, base, "r1")
    first = register_adapter(folder, config, mlflow_run_id=run_id)
    assert register_adapter(folder, config, mlflow_run_id=run_id) == first
    assert len(client_of(home).search_model_versions(f"name = '{NAME}'")) == 1


@pytest.mark.parametrize(
    "step",
    [
        "log_model_artifacts",
        "finalize_logged_model",
        "create_registered_model",
        "create_model_version",
        "set_registered_model_alias",
        "set_model_version_tag",
    ],
)
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_registration_cut_short_anywhere_is_completed_by_the_next(
    home: Path, base: Path, step: str, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = finish_job(home, base, "r1")
    working = getattr(MlflowClient, step)

    def crash(*args: Any, **kwargs: Any) -> None:
        if moment == "after":
            working(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(MlflowClient, step, crash)
    with pytest.raises(KeyboardInterrupt):
        register_adapter(job[0], job[1], mlflow_run_id=job[2])
    monkeypatch.setattr(MlflowClient, step, working)
    assert_completed(home, job)


def test_a_registration_killed_by_the_system_again_and_again_is_completed_by_the_next(
    home: Path, base: Path
) -> None:
    job = finish_job(home, base, "r1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    for moment, step in (
        ("after", "log_model_artifacts"),
        ("before", "create_model_version"),
        ("after", "create_model_version"),
        ("before", "set_registered_model_alias"),
        ("after", "set_registered_model_alias"),
        ("before", "set_model_version_tag"),
        ("after", "set_model_version_tag"),
    ):  # each goes on from where the one before was killed
        process = context.Process(target=register_and_die, args=(home, job, step, moment))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL, (moment, step)
    assert_completed(home, job)


def assert_completed(home: Path, job: tuple[Path, RunConfig, str]) -> None:
    """Registering again makes one version of it."""
    folder, config, run_id = job
    done = register_adapter(folder, config, mlflow_run_id=run_id)
    assert done.version == 1
    assert len(client_of(home).search_model_versions(f"name = '{NAME}'")) == 1
    assert resolve_adapter(NAME).fingerprint == done.fingerprint


def test_a_repeated_registration_does_not_take_the_alias_back(home: Path, base: Path) -> None:
    folder, config, run_id = finish_job(home, base, "r1", seed=1)
    register_adapter(folder, config, mlflow_run_id=run_id)
    register(home, base, "r2", seed=2)
    assert register_adapter(folder, config, mlflow_run_id=run_id).version == 1
    assert resolve_adapter(NAME).version == 2


def test_files_that_read_back_wrong_get_no_alias(
    home: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, config, run_id = finish_job(home, base, "r1", seed=1)
    other = home / "other"
    train_adapter(base, other, seed=2)
    monkeypatch.setattr("s2ft_ray.registry.versions.adapter_folder", lambda *_: other)
    with pytest.raises(AdapterError, match="it gets no alias"):
        register_adapter(folder, config, mlflow_run_id=run_id)
    assert client_of(home).get_registered_model(NAME).aliases == {}


def test_two_registrations_at_once_become_two_versions(
    home: Path, base: Path, server: Server
) -> None:
    server.start()
    jobs = [
        finish_job(home, base, f"r{seed}", seed=seed, tracking={"uri": server.url})
        for seed in (1, 2)
    ]
    versions: list[RegisteredVersion] = []

    def work(folder: Path, config: RunConfig, run_id: str) -> None:
        versions.append(register_adapter(folder, config, mlflow_run_id=run_id))

    threads = [threading.Thread(target=work, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(version.version for version in versions) == [1, 2]
    for version in versions:
        found = resolve_adapter(f"{NAME}:{version.version}", server.url)
        assert found.fingerprint == version.fingerprint
        assert resolve_adapter(f"{NAME}:{version.version}").folder == found.folder


def test_an_mlflow_that_is_down_is_told_with_the_way_out(home: Path, base: Path) -> None:
    folder, config, run_id = finish_job(home, base, "r1")
    uri = Server(home).url
    down = config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": uri})})
    pauses: list[float] = []
    started = time.monotonic()
    with pytest.raises(JobError, match=rf"trained but not registered.*{uri}.*s2ft up"):
        register_adapter(folder, down, mlflow_run_id=run_id, sleep=pauses.append)
    assert pauses == [1.0, 4.0, 10.0]
    with pytest.raises(JobError, match=rf"can't be looked up.*{uri}.*s2ft up"):
        resolve_adapter(NAME, uri)
    assert time.monotonic() - started < 20


def test_files_behind_a_servers_proxy_are_fetched_once(
    home: Path, base: Path, server: Server
) -> None:
    server.start()
    MlflowClient(server.url).create_experiment("proxied")  # at the server's default location
    tracking = {"uri": server.url, "experiment": "proxied"}
    done = register(home, base, "r1", tracking=tracking)
    found = resolve_adapter(NAME, server.url)
    assert found.folder.is_relative_to(home / "adapters")
    assert Adapter.load(found.folder).fingerprint == done.fingerprint
    file = found.folder / "adapter_config.json"
    stamp = file.stat().st_ino
    assert resolve_adapter(NAME, server.url).folder == found.folder
    assert file.stat().st_ino == stamp
    assert forget_kept(found.folder)
    assert not file.exists()
    resolve_adapter(NAME, server.url)
    assert Adapter.load(found.folder).fingerprint == done.fingerprint


def test_what_a_registration_prints_is_for_programs(
    server: Server,
    home: Path,
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter = train_adapter(base, home / "mine")
    server.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    assert cli.main(["register", str(home / "mine"), NAME, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {
        "name": NAME,
        "version": 1,
        "alias": "champion",
        "fingerprint": adapter.fingerprint,
    }


def test_a_parent_is_found_by_name_and_by_folder(home: Path, base: Path) -> None:
    done = register(home, base, "r1", seed=3)
    by_name = resolve_parent(run_config(base, registry={"parent": f"{NAME}@champion"}))
    assert by_name is not None
    assert by_name.tags == {
        "parent": NAME,
        "parent_version": "1",
        "parent_fingerprint": done.fingerprint,
    }
    folder = home / "runs" / "acme" / "support-bot" / "r1" / "adapter"
    by_folder = resolve_parent(run_config(base, registry={"parent": str(folder)}))
    assert by_folder is not None
    assert by_folder.tags == {"parent": str(folder), "parent_fingerprint": done.fingerprint}
    assert resolve_parent(run_config(base)) is None


def test_a_run_with_a_parent_goes_on_with_its_selection(home: Path, base: Path) -> None:
    register(home, base, "r1", seed=3)
    registry = {"parent": NAME}
    same = run_config(base, registry=registry, method={"seed": 3})
    assert resolve_parent(same) is not None
    other = run_config(base, registry=registry, method={"seed": 4, "selection": "weight"})
    with pytest.raises(ConfigError) as caught:
        resolve_parent(other)
    assert len(caught.value.faults) == 2
    with pytest.raises(ConfigError, match=r"holds no adapter_config.json"):
        resolve_parent(run_config(base, registry={"parent": str(home)}))


ASK = """
import json, sys
import mlflow.pyfunc

model = mlflow.pyfunc.load_model("models:/acme.support-bot@champion")
print("answers", json.dumps(model.predict(json.loads(sys.argv[1]), params={"max_new_tokens": 12})))
"""


def expected_answer(base: Path, adapter: Path | None, prompt: Any, length: int) -> str:
    """Answer greedily by a plain forward over the whole text for each token: no cache."""
    model_config = ModelConfig(name_or_path=str(base))
    model, tokenizer = load_base_model(model_config), load_tokenizer(model_config)
    if adapter is not None:
        Adapter.load(adapter).switch_into(model)
    ids = encode_prompt(prompt, tokenizer)
    start = len(ids)
    with torch.no_grad():
        while len(ids) - start < length:
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            ids.append(token)
    return str(tokenizer.decode(ids[start:], skip_special_tokens=True))


def test_a_plain_process_answers_by_mlflows_own_means(home: Path, base: Path) -> None:
    register(home, base, "r1")
    questions = ["Where is it?", "Why?"]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{home / 'mlflow.db'}"}
    done = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(questions)],
        env=environment,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    answers = json.loads(done.stdout.partition("answers ")[2])
    folder = home / "runs" / "acme" / "support-bot" / "r1" / "adapter"
    turns = [{"messages": [{"role": "user", "content": question}]} for question in questions]
    assert answers == [expected_answer(base, folder, turn, 12) for turn in turns]
    assert answers != [expected_answer(base, None, turn, 12) for turn in turns]


@pytest.fixture(scope="module")
def model(base: Path, tmp_path_factory: pytest.TempPathFactory) -> AdapterModel:
    folder = tmp_path_factory.mktemp("adapter")
    train_adapter(base, folder)
    return _load_pyfunc(str(folder))


def user(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


def test_every_form_of_input_gets_the_same_answers(model: AdapterModel) -> None:
    texts = ["Where is it?", "Why?", "Tell me the whole story"]
    params = {"max_new_tokens": 10}
    singles = [model.predict([text], params)[0] for text in texts]
    assert len(set(singles)) == 3
    chats = [user(text) for text in texts]
    for form in (
        texts,
        chats,
        tuple(texts),
        pd.Series(texts),
        pd.DataFrame({"id": [1, 2, 3], "prompt": texts}),
        pd.DataFrame({"messages": [chat["messages"] for chat in chats]}),
        [{"prompt": text} for text in texts],
    ):
        assert model.predict(form, params) == singles
    assert model.predict(texts[0], params) == model.predict(chats[0], params) == singles[:1]


def test_sampling_is_a_function_of_the_seed_alone(model: AdapterModel) -> None:
    def ask(prompts: list[str], seed: int) -> list[str]:
        params = {"max_new_tokens": 10, "temperature": 1.5, "seed": seed}
        return model.predict(prompts, params)

    torch.manual_seed(5)
    before = torch.get_rng_state()
    together = ask(["Why?", "Where?"], 7)
    assert torch.equal(torch.get_rng_state(), before)
    assert together == [*ask(["Why?"], 7), *ask(["Where?"], 7)]
    assert ask(["Why?"], 8) != ask(["Why?"], 7)
    assert model.predict(["Why?"], {"max_new_tokens": 10}) != ask(["Why?"], 7)


def test_an_answer_ends_with_the_context(model: AdapterModel) -> None:
    long = "x" * 70
    limit = model.model.config.max_position_embeddings
    room = limit - len(encode_prompt(user(long), model.tokenizer))
    assert 0 < room < 30
    answer = model.predict([long], {"max_new_tokens": 500})[0]
    assert len(model.tokenizer(answer)["input_ids"]) <= room


@pytest.mark.parametrize(
    ("form", "told"),
    [
        ([1], "row 0 is int 1"),
        (["fine", None], "row 1 is NoneType None"),
        ([{"text": "x"}], "row 0 is dict {'text': 'x'}"),
        ([{"role": "user", "content": "hi"}], "pass a list of prompts"),
        ([{"messages": "hi"}], "row 0 is dict"),
        ([{"messages": []}], "last message must be the user's"),
        ([{"messages": [{"role": "user"}]}], "a message is dict {'role': 'user'}"),
        ([{"messages": [{"role": "assistant", "content": "x"}]}], "must be the user's"),
        (pd.DataFrame({"question": ["x"]}), "has the columns question"),
        (pd.DataFrame({"prompt": ["x", float("nan")]}), "row 1 is float nan"),
        (["x" * 200], "row 0 has 2"),
        (7, "the input is int 7"),
    ],
)
def test_input_of_another_form_is_a_config_error(model: AdapterModel, form: Any, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        model.predict(form)
    assert told in str(caught.value)
    assert str(caught.value).startswith("predict: ")


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"top_p": 0.5}, "unknown params ['top_p']; known: max_new_tokens, temperature, seed"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; at least 1"),
        ({"temperature": -1.0}, "temperature is -1.0; take 0 or more"),
        ({"temperature": float("nan")}, "temperature is nan; take 0 or more"),
    ],
)
def test_params_out_of_range_are_config_errors(
    model: AdapterModel, params: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        model.predict(["x"], params)
    assert told in str(caught.value)


def test_a_literal_adapter_takes_a_prompt_as_it_is(base: Path, tmp_path: Path) -> None:
    for row_format, prompt in (
        ("completion", "One two"),
        ("instruction", {"instruction": "One two"}),
    ):
        train_adapter(base, tmp_path / row_format, row_format=row_format)
        model = _load_pyfunc(str(tmp_path / row_format))
        expected = expected_answer(base, tmp_path / row_format, prompt, 10)
        assert model.predict(["One two"], {"max_new_tokens": 10}) == [expected]


def test_another_base_under_the_same_name_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    train_adapter(base, tmp_path / "adapter")
    weights = load_base_model(ModelConfig(name_or_path=str(base)))
    with torch.no_grad():
        weights.model.embed_tokens.weight += 1
    weights.save_pretrained(base)
    with pytest.raises(AdapterError, match="the base differs"):
        _load_pyfunc(str(tmp_path / "adapter"))
