"""What a deployment of the service is made of, from Python and from deploy/serve.yaml."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.schema import ServeDeploySchema

from s2ft_ray.serving.app import build_app
from s2ft_ray.serving.settings import BaseSettings, ServingSettings

DEPLOY = Path(__file__).parents[2] / "deploy"


def test_serve_yaml_is_what_serve_takes_and_builds_the_application() -> None:
    document = yaml.safe_load((DEPLOY / "serve.yaml").read_text())
    schema = ServeDeploySchema.model_validate(document)
    (application,) = schema.applications
    assert application.import_path == "s2ft_ray.serving.app:build_app"
    app = call_user_app_builder_with_args_if_necessary(build_app, application.args)
    assert app._bound_deployment.name == "Ingress"
    assert not ServingSettings.model_validate(application.args).no_auth


def test_a_base_is_called_by_its_name_its_folders_name_or_its_id(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    assert BaseSettings().model_id == "s2ft://tiny"
    assert BaseSettings(model={"name_or_path": str(folder)}).model_id == "my-model"  # type: ignore[arg-type]
    assert BaseSettings(id="mine").model_id == "mine"


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValidationError, match="two are called s2ft://tiny"):
        ServingSettings(bases=[BaseSettings(), BaseSettings()])
    with pytest.raises(ValidationError, match="min_replicas 3 is above max_replicas 1"):
        BaseSettings(min_replicas=3)
    with pytest.raises(ValidationError, match="Extra inputs"):
        ServingSettings.model_validate({"base": []})
