"""Aliases in a real MLflow: moved, moved back, listed, with what serving found out."""

from pathlib import Path

import pytest
from mlflow import MlflowClient
from registry_parts import make_database, make_home

from s2ft_ray.cli import main
from s2ft_ray.errors import AdapterError, ConfigError, JobError
from s2ft_ray.registry import (
    AliasMove,
    list_models,
    note_accepted,
    note_rejected,
    note_served,
    place,
    promote,
    rollback,
)

NAME = "acme.bot"


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_database(tmp_path_factory.mktemp("database"))


@pytest.fixture
def uri(tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A registry with three versions of one model."""
    uri = f"sqlite:///{make_home(tmp_path, database, monkeypatch) / 'mlflow.db'}"
    client = MlflowClient(uri, uri)
    client.create_registered_model(NAME)
    for _ in range(3):
        client.create_model_version(NAME, tmp_path.as_uri())
    return uri


def test_an_alias_moves_and_goes_back_and_forth(uri: str) -> None:
    assert promote(NAME, 1) == AliasMove(NAME, "champion", 1, None)
    with pytest.raises(AdapterError, match="is version 1 and was no other before"):
        rollback(NAME)
    assert promote(NAME, 3) == AliasMove(NAME, "champion", 3, 1)
    assert promote(NAME, 3) == AliasMove(NAME, "champion", 3, 3)
    assert rollback(NAME) == AliasMove(NAME, "champion", 1, 3)
    assert rollback(NAME) == AliasMove(NAME, "champion", 3, 1)
    assert promote(NAME, 2, "trial").before is None
    (model,) = list_models(uri)
    assert model.aliases == {"champion": 3, "trial": 2}


def test_what_cant_be_moved_is_told_by_name(uri: str) -> None:
    with pytest.raises(AdapterError, match="no version 9; it has 1, 2, 3"):
        promote(NAME, 9)
    with pytest.raises(AdapterError, match=r"no adapter is registered as acme\.other"):
        promote("acme.other", 1)
    with pytest.raises(AdapterError, match="has no alias champion"):
        rollback(NAME)
    with pytest.raises(ConfigError):
        promote("Acme", 1)
    with pytest.raises(ConfigError, match="reserved"):
        promote(NAME, 1, "latest")
    assert list_models(uri)[0].aliases == {}


def test_serving_notes_what_it_served_and_what_it_refused(uri: str) -> None:
    client = MlflowClient(uri, uri)
    client.set_registered_model_tag(NAME, "s2ft.shared_with", "globex, initech")
    note_served(NAME, "champion", 2, uri)
    note_rejected(NAME, 3, "canary: off", uri)
    (model,) = list_models(uri)
    assert model.served == {"champion": 2}
    assert model.shared_with == {"globex", "initech"}
    assert client.get_model_version(NAME, "3").tags["s2ft.rejected"] == "canary: off"
    for _ in range(2):
        note_accepted(NAME, 3, uri)
        assert "s2ft.rejected" not in client.get_model_version(NAME, "3").tags


def test_a_placement_is_kept_with_its_alias(uri: str) -> None:
    promote(NAME, 1)
    place(NAME, "champion", "pinned")
    assert list_models(uri)[0].placements == {"champion": "pinned"}
    for _ in range(2):
        place(NAME, "champion", None)
        assert list_models(uri)[0].placements == {}
    with pytest.raises(ConfigError, match="take one of warm, pinned, dedicated"):
        place(NAME, "champion", "hot")
    with pytest.raises(AdapterError, match="has no alias trial"):
        place(NAME, "trial", "warm")


def test_the_command_line_places(uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    promote(NAME, 1)
    assert main(["adapters", "place", NAME, "dedicated"]) == 0
    assert capsys.readouterr().out == f"{NAME}@champion is dedicated\n"
    assert list_models(uri)[0].placements == {"champion": "dedicated"}
    assert main(["adapters", "place", NAME, "free"]) == 0
    assert list_models(uri)[0].placements == {}


def test_the_command_line_shares_and_takes_back(
    uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapters", "share", NAME, "globex", "initech"]) == 0
    assert capsys.readouterr().out == f"{NAME} is shared with globex, initech\n"
    assert list_models(uri)[0].shared_with == {"globex", "initech"}
    assert main(["adapters", "share", NAME, "*"]) == 0
    assert list_models(uri)[0].shared_with == {"*"}
    assert main(["adapters", "share", NAME]) == 0
    assert list_models(uri)[0].shared_with == set()


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [([NAME, "Globex, Inc."], "'Globex, Inc.' is no tenant's name"), (["a.nobody", "b"], "nobody")],
)
def test_what_cannot_be_shared_is_told(
    uri: str, arguments: list[str], fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapters", "share", *arguments]) == 2
    assert fault in capsys.readouterr().err
    assert list_models(uri)[0].shared_with == set()


def test_a_registry_that_is_away_is_told() -> None:
    with pytest.raises(JobError, match="can't be used"):
        list_models("http://127.0.0.1:9")
