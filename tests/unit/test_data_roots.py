from pathlib import Path
from typing import Any

import pytest

from s2ft_ray.accounts import Tenant, is_inside
from s2ft_ray.config import parse_config
from s2ft_ray.errors import ConfigError
from s2ft_ray.scheduler.intake import build_submission


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tenant's folder beside another one's; it holds a file, and a link to the other's."""
    monkeypatch.setenv("S2FT_HOME", str(tmp_path / "home"))
    for name in ("mine", "mine-too", "theirs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text("{}")
    (tmp_path / "mine" / "link.jsonl").symlink_to(tmp_path / "theirs" / "rows.jsonl")
    return tmp_path / "mine"


def test_paths_lie_inside_by_what_they_lead_to(root: Path) -> None:
    assert is_inside(str(root / "rows.jsonl"), [str(root)])
    assert is_inside(str(root / "later" / "rows.jsonl"), ["s3://bucket", str(root)])
    for outside in ("../theirs/rows.jsonl", "link.jsonl", "../mine-too/rows.jsonl"):
        assert not is_inside(str(root / outside), [str(root)]), outside
    assert not is_inside("rows.jsonl", [str(root)])
    assert not is_inside(f"file://{root}/rows.jsonl", [str(root)])


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("s3://bucket/acme/rows.jsonl", True),
        ("s3://bucket/acme-other/rows.jsonl", False),
        ("s3://bucket/acme/../other/rows.jsonl", False),
        ("s3://bucket/acme/%2e%2e/other/rows.jsonl", False),
        ("http://169.254.169.254/latest", False),
        ("org/dataset", False),
    ],
)
def test_urls_lie_inside_by_their_folders(name: str, inside: bool) -> None:
    assert is_inside(name, ["s3://bucket/acme"]) is inside


def submit(tenant: Tenant, **data: Any) -> None:
    config = parse_config({"tenant": "acme", "name": "bot", "data": data})
    build_submission(config, tenant, 0, [], idempotency_key="key")


def test_a_job_on_data_outside_its_tenants_roots_is_refused_by_name(root: Path) -> None:
    tenant = Tenant(name="acme", data_roots=(str(root),))
    mine, theirs = root / "rows.jsonl", root.parent / "theirs" / "rows.jsonl"
    submit(tenant, train=str(mine))
    submit(tenant, train=str(root.parent / "home" / "files" / "0a" / "rows.jsonl"))  # its upload
    submit(Tenant(name="acme"), train=str(theirs))  # no roots, no limit
    with pytest.raises(ConfigError) as error:
        submit(tenant, train=[str(mine), str(theirs)], eval="/etc/passwd")
    train, held_out = error.value.faults
    assert train.startswith(f"data.train: {theirs} lies in none of tenant acme's data roots")
    assert held_out.startswith("data.eval: /etc/passwd")
