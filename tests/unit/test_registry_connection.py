from pathlib import Path

import pytest
from boto3.exceptions import S3UploadFailedError
from botocore.exceptions import ClientError, EndpointConnectionError
from method_models import build_model
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import OperationalError

from s2ft_ray.config import RunConfig, S2FTConfig, parse_config
from s2ft_ray.errors import RegistryUnreachable
from s2ft_ray.method import convert, extract_adapter
from s2ft_ray.registry import RegisteredVersion, default_tracking_uri, register_adapter, versions
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
        S3UploadFailedError("Failed to upload adapter_model.safetensors to acme/model"),
        EndpointConnectionError(endpoint_url="https://s3.example.com"),
        ClientError({"Error": {"Code": "SlowDown"}}, "GetObject"),
    ],
)
def test_what_goes_wrong_with_mlflow_is_the_registrys_fault(error: Exception) -> None:
    with (
        pytest.raises(RegistryUnreachable, match="r1: not registered: MLflow at u can't be used"),
        reaching("u", "r1: not registered"),
    ):
        raise error


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("num_failures", [2, 4])
def test_a_registration_is_tried_four_times(
    num_failures: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model()
    convert(model, S2FTConfig(budgets={"down": 0.1}))
    extract_adapter(model).save(tmp_path / "adapter")
    made = RegisteredVersion("a.b", 1, "champion", "f" * 64)
    faults = [S3UploadFailedError("s3 is down"), MlflowException("server error")] * 2

    def complete(*_: object) -> RegisteredVersion:
        if len(faults) > 4 - num_failures:
            raise faults.pop()
        return made

    monkeypatch.setattr(versions._Registration, "complete", complete)
    pauses_s: list[float] = []

    def register() -> RegisteredVersion:
        folder = tmp_path / "adapter"
        return register_adapter(folder, config(), mlflow_run_id="r1", sleep=pauses_s.append)

    if num_failures == 4:
        with pytest.raises(RegistryUnreachable, match=r"trained but not registered: .*s3 is down"):
            register()
    else:
        assert register() == made
    assert pauses_s == [1.0, 4.0, 10.0][:num_failures]
