import pickle
from pathlib import Path

import pytest

from s2ft_ray import errors
from s2ft_ray.config import RunConfig, S2FTConfig, load_config, parse_config
from s2ft_ray.errors import ConfigError

MINIMAL = {"tenant": "acme", "name": "bot", "data": {"train": "a.jsonl"}}


def faults_of(document: dict) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        parse_config(document, source="run.yaml")
    return caught.value.faults


def test_a_resolved_run_reads_back_as_itself(tmp_path: Path) -> None:
    config = parse_config({**MINIMAL, "optim": {"lr": "1e-3", "max_steps": 7}})
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml())
    assert load_config(path) == config
    assert config.optim.lr == 1e-3
    assert config.optim.epochs is None


def test_a_file_url_names_a_folder() -> None:
    config = parse_config({**MINIMAL, "checkpoint": {"storage_path": "file:///mnt/runs"}})
    assert config.checkpoint.storage_path == "/mnt/runs"


def test_overrides_apply_in_order_and_reach_new_sections(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("tenant: acme\nname: bot\ndata: {train: a.jsonl}\n")
    config = load_config(
        path, ["optim.lr=1", "optim.lr=1e-3", "method.budgets={down: 0.5}", "data.packing=true"]
    )
    assert config.optim.lr == 1e-3
    assert config.method.budgets == {"down": 0.5}
    assert config.data.packing is True


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"modl": {}}, "modl: unknown key; did you mean model?"),
        ({"optim": {"learning": 1}}, "optim.learning: unknown key; known here: lr, betas"),
        (
            {"checkpoint": {"storage_path": "s3://acme/runs"}},
            "checkpoint.storage_path: runs live in a folder that every node mounts",
        ),
        ({"optim": {"lr": -1}}, "optim.lr: input should be greater than 0 (got -1)"),
        ({"optim": {"lr": float("inf")}}, "optim.lr: input should be a finite number"),
        ({"optim": {"epochs": 1, "max_steps": 2}}, "optim: epochs and max_steps are both set"),
        ({"method": {"budgets": {"o": 1.5}}}, "method.budgets.o: input should be less than"),
        ({"method": {"budgets": {"oo": 0.5}}}, "method.budgets.oo: input should be 'q'"),
        ({"method": {"budgets": {}}}, "method.budgets: no budget is set"),
        ({"parallel": {"num_workers": [4, 1]}}, "parallel: num_workers [4, 1] is no range"),
        ({"parallel": {"num_workers": 0}}, "parallel.num_workers"),
        ({"tenant": "Acme Inc"}, "tenant: string should match pattern"),
        ({"registry": {"alias": "latest"}}, "registry.alias: is reserved by MLflow; take another"),
        ({"registry": {"alias": "V1"}}, "registry.alias: is reserved by MLflow; take another"),
        ({"registry": {"alias": "1"}}, "registry.alias: string should match pattern"),
        ({"data": {}}, "data.train: is required"),
        (
            {"data": {"train": [{"path": "a", "wieght": 2}]}},
            "data.train.0.wieght: unknown key; did you mean weight?",
        ),
        ({"data": {"train": []}}, "data.train: list should have at least 1 item"),
        ({"data": {"train": [3]}}, "data.train.0: holds 3, not keys; known here: path, weight"),
        ({"optim": None}, "optim: holds nothing, not keys; known here: lr, betas"),
        ({"parallel": {"num_workers": [1, "x"]}}, "parallel.num_workers.1: input should be"),
        ({"parallel": {"num_workers": "many"}}, "parallel.num_workers: input should be"),
        (
            {
                "data": {"train": "a", "packing": True},
                "model": {"attn_implementation": "flash_attention_2"},
            },
            "optim.micro_batch_size 4: packing with flash_attention_2",
        ),
        (
            {"optim": {"global_batch_size": 10, "micro_batch_size": 4}},
            "optim.global_batch_size 10 is no multiple of optim.micro_batch_size 4; take 12",
        ),
        (
            {
                "optim": {"global_batch_size": 8, "micro_batch_size": 4},
                "parallel": {"num_workers": [1, 3]},
            },
            "parallel.num_workers 3: a step has 2 micro-batches",
        ),
    ],
)
def test_a_fault_names_the_key_the_value_and_the_way_out(change: dict, expected: str) -> None:
    (fault,) = faults_of({**MINIMAL, **change})
    assert fault.startswith(f"run.yaml: {expected}")


def test_every_fault_is_told_at_once() -> None:
    assert len(faults_of({"tenant": "A", "data": {"max_seq_len": 0}, "seed": -1})) == 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "can't be read: No such file"),
        ("a: [", "no valid YAML"),
        ("optim: {lr: 1}\ndata: {}\noptim: {}", "the key optim stands twice in"),
        ("optim:\n  lr: 1\n  lr: 2", "the key lr stands twice in"),
        ("- 1", "holds list, not a mapping"),
        ("\x00", "no valid YAML"),
        ("name: 2024-13-45", "no valid YAML: month must be in 1..12"),
        ("seed: " + "1" * 5000, "no valid YAML: Exceeds the limit"),
        ("a: " + "[" * 100_000, "no valid YAML: maximum recursion depth exceeded"),
        ("name: !!bool bot", "no valid YAML"),
        ("name: !!int ''", "no valid YAML"),
        ("name: !!timestamp bot", "no valid YAML"),
    ],
)
def test_an_unreadable_file_is_one_clear_fault(
    tmp_path: Path, text: str | None, expected: str
) -> None:
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert len(caught.value.faults) == 1
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    "override", ["lr", "=1", "tenant.x=1", "data.train=[}", "name=2024-99-99", "a=" + "[" * 100_000]
)
def test_a_bad_override_is_named(tmp_path: Path, override: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("tenant: acme\nname: bot\ndata: {train: a}\n")
    with pytest.raises(ConfigError, match="--set"):
        load_config(path, [override])


def test_the_method_alone_raises_config_errors_too() -> None:
    with pytest.raises(ConfigError, match=r"budgets\.o: .*greater than 0"):
        S2FTConfig(budgets={"o": 0})
    with pytest.raises(ConfigError, match="did you mean seed"):
        S2FTConfig(sead=1)


def test_every_error_survives_pickling() -> None:
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and "__reduce__" not in vars(kind)  # those have their own tests
    ]
    assert len(kinds) >= 8
    for kind in kinds:
        copy = pickle.loads(pickle.dumps(kind("a: 1", "b: 2")))
        assert type(copy) is kind
        assert copy.faults == ("a: 1", "b: 2")


def test_the_schema_names_every_section_of_the_contract() -> None:
    sections = {"model", "data", "method", "optim", "parallel", "checkpoint", "registry"}
    assert sections | {"tenant", "name", "priority", "seed", "tracking"} <= set(
        RunConfig.model_fields
    )


def test_layers_are_a_list_or_a_range() -> None:
    assert S2FTConfig(layers="4-6").layers == S2FTConfig(layers=range(4, 7)).layers == [4, 5, 6]
    assert S2FTConfig(layers=[3, 1]).layers == [3, 1]
    with pytest.raises(ConfigError, match=r"layers: .*valid list.*4-"):
        S2FTConfig(layers="4-")


def test_a_child_run_reads_back_without_a_selection_of_its_own() -> None:
    values = {"tenant": "acme", "name": "child", "data": {"train": "rows.jsonl"}}
    child = parse_config({**values, "registry": {"parent": "acme.parity"}})
    assert child.to_document()["method"] == {}
    assert parse_config(child.to_document()).method.model_fields_set == set()
    plain = parse_config(values)
    assert plain.to_document()["method"]["budgets"] == {"o": 0.03, "down": 0.03}
