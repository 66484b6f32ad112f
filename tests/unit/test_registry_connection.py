from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import OperationalError

from s2ft_ray.config import RunConfig, parse_config
from s2ft_ray.errors import RegistryUnreachable
from s2ft_ray.registry import default_tracking_uri
from s2ft_ray.registry.connection import artifact_location, reaching
from s2ft_ray.registry.delivery import metric_key


class Client:
    def __init__(self, tracking_uri: str) -> None:
        self.tracking_uri = tracking_uri


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("S2FT_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("S2FT_ARTIFACT_ROOT", raising=False)
    return tmp_path


def config(**tracking: str) -> RunConfig:
    return parse_config({"tenant": "a", "name": "b", "data": {"train": "x"}, "tracking": tracking})


def test_the_tracking_uri_is_the_configs_then_the_environments_then_the_homes(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert default_tracking_uri() == f"sqlite:///{home}/mlflow.db"
    assert default_tracking_uri(config()) == f"sqlite:///{home}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there:5000")
    assert default_tracking_uri(config()) == "http://there:5000"
    assert default_tracking_uri(config(uri="sqlite:////x.db")) == "sqlite:////x.db"


@pytest.mark.parametrize("uri", ["sqlite:////x.db", "http://127.0.0.1:5000", "http://localhost:1"])
def test_on_one_machine_artifacts_lie_where_any_reader_finds_them(uri: str, home: Path) -> None:
    location = artifact_location(Client(uri), "s2ft/acme")
    assert location == (home / "mlartifacts" / "s2ft-acme").as_uri()


@pytest.mark.usefixtures("home")
def test_a_server_elsewhere_keeps_its_own_artifact_location() -> None:
    assert artifact_location(Client("https://mlflow.example.com"), "s2ft/acme") is None


@pytest.mark.usefixtures("home")
def test_a_given_artifact_root_is_used_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S2FT_ARTIFACT_ROOT", "s3://bucket/s2ft/")
    for uri in ("sqlite:////x.db", "https://mlflow.example.com"):
        assert artifact_location(Client(uri), "../odd name") == "s3://bucket/s2ft/-odd-name"


def test_a_metrics_name_is_one_that_mlflow_takes() -> None:
    assert metric_key("delta/model.layers.0.mlp.down_proj/norm") == (
        "delta/model.layers.0.mlp.down_proj/norm"
    )
    assert metric_key("résumé (50%)") == "résumé _50__"
    assert len(metric_key("x" * 400)) == 250


@pytest.mark.parametrize(
    "error",
    [
        OperationalError("INSERT", {}, Exception("database or disk is full")),
        MlflowException("server error"),
        ConnectionRefusedError("nobody listens"),
    ],
)
def test_what_goes_wrong_with_mlflow_is_the_registrys_fault(error: Exception) -> None:
    with (
        pytest.raises(RegistryUnreachable, match="r1: not registered: MLflow at u can't be used"),
        reaching("u", "r1: not registered"),
    ):
        raise error
