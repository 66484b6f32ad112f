from pathlib import Path

import pytest

from s2ft_ray.errors import ConfigError
from s2ft_ray.scheduler.settings import NodeGroup, QueueSettings, load_settings


def test_without_a_file_every_number_has_its_default(tmp_path: Path) -> None:
    assert load_settings(tmp_path / "scheduler.yaml") == QueueSettings()


def test_what_the_file_names_is_taken_and_the_rest_stays(tmp_path: Path) -> None:
    path = tmp_path / "scheduler.yaml"
    path.write_text("service: {grace_s: 5, max_waiting: 2}\npolicy:\n  near_end_s: 1\n")
    settings = load_settings(path)
    assert (settings.service.grace_s, settings.service.max_waiting) == (5.0, 2)
    assert settings.policy.near_end_s == 1.0
    path.write_text("autoscaler: [{name: gpu, max_nodes: 8, resources: {GPU: 1}}]\n")
    assert load_settings(path).autoscaler == (NodeGroup("gpu", 8, {"GPU": 1.0}),)
    assert settings.policy.half_life_s == QueueSettings().policy.half_life_s


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("service: {grace: 5}", ["service.grace: unknown key; did you mean grace_s?"]),
        ("polices: {}", ["polices: unknown section; known: service, policy, autoscaler"]),
        ("service: {grace_s: soon}", ["service.grace_s: is a number of at least 0 (got 'soon')"]),
        ("policy: {near_end_s: -1}", ["policy.near_end_s: is a number of at least 0 (got -1)"]),
        ("policy: [1]", ["policy: holds no settings"]),
        ("autoscaler: [{name: gpu}]", ["autoscaler.0.max_nodes: ", "autoscaler.0.resources: "]),
        ("just text", ["holds no sections"]),
        ("service: {", ["can't be read"]),
    ],
)
def test_a_fault_names_file_key_and_value(tmp_path: Path, text: str, faults: list[str]) -> None:
    path = tmp_path / "scheduler.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_settings(path)
    assert len(error.value.faults) == len(faults)
    for line, expected in zip(error.value.faults, faults, strict=True):
        assert line.startswith(str(path))
        assert expected in line
