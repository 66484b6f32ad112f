"""The manifests fit the schemas of those who will read them, and the parts that they name exist."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from s2ft_ray.scheduler.settings import load_settings
from s2ft_ray.serving.settings import SERVE_ENV

REPO = Path(__file__).parents[2]
DEPLOY = REPO / "deploy"
CRDS = REPO.parent / "shared" / "crds"
KUBERNETES = "1.32"


def documents(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted(folder.glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            yield f"{path.name}:{document['kind']}:{document['metadata']['name']}", document


MANIFESTS = dict(documents(DEPLOY / "kuberay"))
OF_RAY = {name: it for name, it in MANIFESTS.items() if it["apiVersion"].startswith("ray.io")}


@pytest.mark.parametrize("name", [name for name in MANIFESTS if name not in OF_RAY])
def test_a_manifest_fits_kubernetes_own_schema(name: str) -> None:
    kubernetes_validate.validate(MANIFESTS[name], KUBERNETES, strict=True)


@pytest.mark.parametrize("name", OF_RAY)
@pytest.mark.skipif(not CRDS.exists(), reason="KubeRay's CRDs are not beside this checkout")
def test_a_ray_manifest_fits_kuberays_schema(name: str) -> None:
    manifest = OF_RAY[name]
    text = (CRDS / f"ray.io_{manifest['kind'].lower()}s.yaml").read_text()
    crd = yaml.load(text, Loader=yaml.CSafeLoader)  # megabytes
    (version,) = (it for it in crd["spec"]["versions"] if it["name"] == "v1")
    schema = closed(version["schema"]["openAPIV3Schema"])
    jsonschema.validate({**manifest, "metadata": {}}, schema)


def closed(schema: Any) -> Any:
    """Return the schema so that a field it doesn't know is an error, as `kubectl` has it."""
    if isinstance(schema, list):
        return [closed(it) for it in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        open_ended = "additionalProperties" in schema
        open_ended |= bool(schema.get("x-kubernetes-preserve-unknown-fields"))
        if not open_ended:
            inner["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        return {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    return inner


def test_a_misspelt_field_is_found() -> None:
    schema = closed({"type": "object", "properties": {"image": {"type": "string"}}})
    with pytest.raises(jsonschema.ValidationError, match="imgae"):
        jsonschema.validate({"imgae": "x"}, schema)


def containers(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "containers":
                yield from value
            else:
                yield from containers(value)
    elif isinstance(node, list):
        for value in node:
            yield from containers(value)


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_container_asks_for_what_it_needs_and_finds_its_secrets(name: str) -> None:
    secrets = {
        it["metadata"]["name"]: set(it["stringData"])
        for it in MANIFESTS.values()
        if it["kind"] == "Secret"
    }
    made_by_kuberay = {it["metadata"]["name"]: {"auth_token"} for it in OF_RAY.values()}
    for container in containers(MANIFESTS[name]):
        assert {"cpu", "memory"} <= set(container["resources"]["requests"])
        assert "memory" in container["resources"]["limits"]
        for variable in container.get("env", []):
            if "valueFrom" in variable:
                ref = variable["valueFrom"]["secretKeyRef"]
                assert ref["key"] in {**secrets, **made_by_kuberay}[ref["name"]]


def test_clusters_ask_for_a_token_and_survive_their_head() -> None:
    for manifest in OF_RAY.values():
        cluster = manifest["spec"].get("rayClusterConfig", manifest["spec"])
        assert cluster["authOptions"]["mode"] == "token"
        assert cluster["gcsFaultToleranceOptions"]["redisAddress"]
        assert cluster["rayVersion"] == pinned("ray")


def test_no_services_clusters_share_their_redis() -> None:
    # an upgrade runs the new cluster beside the old one: in one namespace it would load its state
    for manifest in OF_RAY.values():
        if manifest["kind"] == "RayService":
            options = manifest["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]
            assert "externalStorageNamespace" not in options


def test_the_services_document_is_one_that_the_app_takes() -> None:
    import importlib

    from s2ft_ray.serving.settings import ServingSettings

    (service,) = (it for it in OF_RAY.values() if it["kind"] == "RayService")
    ours = yaml.safe_load((DEPLOY / "serve.yaml").read_text())
    theirs = yaml.safe_load(service["spec"]["serveConfigV2"])
    for document in (ours, theirs):
        (application,) = document["applications"]
        module, _, builder = application["import_path"].partition(":")
        assert callable(getattr(importlib.import_module(module), builder))
        ServingSettings.model_validate(application["args"])
    assert theirs["applications"][0]["import_path"] == ours["applications"][0]["import_path"]


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    dashboard = json.loads((DEPLOY / "grafana" / "serving.json").read_text())
    source = (REPO / "s2ft_ray" / "serving" / "metrics.py").read_text()
    exprs = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = {name for expr in exprs for name in re.findall(r"ray_(s2ft_\w+?)(?:_bucket)?\b", expr)}
    assert asked
    for name in asked:
        assert f'"{name}"' in source, name


def test_the_image_installs_the_pinned_package() -> None:
    text = (DEPLOY / "Containerfile").read_text()
    assert "--constraint" in text
    for source in re.findall(r"^COPY (.+) \S+$", text, re.M):
        for name in source.split():
            path = name.replace("${CONSTRAINTS}", "constraints.txt")
            assert (REPO / path).exists(), name


def test_ray_up_takes_the_cluster_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((DEPLOY / "cluster.yaml").read_text())
    validate_config(prepare_config(config))


def pinned(package: str) -> str:
    lines = (REPO / "constraints.txt").read_text().splitlines()
    return next(line.split("==")[1] for line in lines if line.startswith(f"{package}=="))


def test_the_queue_is_told_of_every_node_that_the_autoscaler_may_add(tmp_path: Path) -> None:
    cluster = MANIFESTS["raycluster.yaml:RayCluster:s2ft-training"]["spec"]
    path = tmp_path / "scheduler.yaml"
    path.write_text(MANIFESTS["raycluster.yaml:ConfigMap:s2ft-scheduler"]["data"][path.name])
    told = {it.name: it for it in load_settings(path).autoscaler}
    assert told.keys() == {it["groupName"] for it in cluster["workerGroupSpecs"]}
    for group in cluster["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        asked, mine = container["resources"]["requests"], told[group["groupName"]]
        assert mine.max_nodes == group["maxReplicas"]
        assert mine.resources == {
            "CPU": float(asked["cpu"]),
            "GPU": float(asked["nvidia.com/gpu"]),
            "memory": float(asked["memory"].removesuffix("Gi")) * 2**30,
        }


def test_the_image_sets_what_serve_needs() -> None:
    (line,) = [
        line
        for line in (DEPLOY / "Containerfile").read_text().splitlines()
        if line.startswith("ENV ") and "RAY_SERVE" in line
    ]
    assert {f"{key}={value}" for key, value in SERVE_ENV.items()} <= set(line.split())


def test_ray_up_starts_every_node_with_what_serve_needs() -> None:
    config = yaml.safe_load((DEPLOY / "cluster.yaml").read_text())
    commands = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    started = [line.split("ray start")[0].split() for line in commands if "ray start" in line]
    assert len(started) == 2
    for variables in started:
        assert {f"{key}={value}" for key, value in SERVE_ENV.items()} <= set(variables)
