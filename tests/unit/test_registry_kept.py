"""The disk cache of fetched adapters: bounded, oldest first, and never the originals."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from s2ft_ray.registry import KeptAdapter, forget_kept, list_kept, resolution, trim_kept
from s2ft_ray.registry.kept import kept_folder, note_read

VERSIONS = ["1", "2", "3"]


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Three adapters of 1,000 bytes each, the first fetched longest ago."""
    monkeypatch.setenv("S2FT_HOME", str(tmp_path))
    folders = [kept_folder("acme.bot", version, "f" * 64) for version in VERSIONS]
    for place, folder in enumerate(folders):
        folder.mkdir(parents=True)
        (folder / "adapter_model.safetensors").write_bytes(b"x" * 1000)
        os.utime(folder, (place, place))
    return folders


def left(kept: list[Path]) -> list[str]:
    return [version for version, folder in zip(VERSIONS, kept, strict=True) if folder.exists()]


def test_what_was_wanted_longest_ago_goes_first(kept: list[Path]) -> None:
    assert trim_kept(3000) == 3000
    note_read(kept[0])
    assert trim_kept(2500) == 2000
    assert left(kept) == ["1", "3"]


def test_what_is_kept_is_listed_with_its_bytes_and_last_use(kept: list[Path]) -> None:
    (kept[1].parent / "removed-0").mkdir()
    text = json.dumps({"base": {"fingerprint": "b"}})
    for folder in kept[:2]:  # the third has no description
        (folder / "adapter_config.json").write_text(text)
        os.utime(folder, (5, 5))
    assert list_kept() == [
        KeptAdapter("acme.bot", version, "b", 1000 + len(text), 5.0) for version in (1, 2)
    ]


def test_the_last_one_stays_and_nothing_else_does(kept: list[Path]) -> None:
    coming = kept[0].with_name("tmp1234")
    coming.mkdir()
    assert trim_kept(0) == 1000
    assert left(kept) == ["3"]
    assert sorted(kept[0].parent.iterdir()) == sorted([kept[2], coming])


def test_only_copies_are_forgotten(kept: list[Path], tmp_path: Path) -> None:
    original = tmp_path / "mlartifacts" / "adapter"
    original.mkdir(parents=True)
    assert not forget_kept(original)
    assert original.exists()
    assert forget_kept(kept[1])
    assert left(kept) == ["1", "3"]


def test_a_full_disk_costs_the_other_copies_and_not_the_adapter(
    kept: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[Path] = []

    def fetch(_client: Any, _uri: str, folder: Path) -> None:
        if len(left(kept)) > 1:
            try:
                raise OSError(errno.ENOSPC, "No space left on device")
            except OSError as error:
                raise MlflowException("download failed") from error
        fetched.append(folder)

    class Client:
        def get_model_version_download_uri(self, *_: Any) -> str:
            return "mlflow-artifacts:/x"

    class Version:
        name, version, tags = "acme.bot", "4", {"fingerprint": "a" * 64}

    monkeypatch.setattr(resolution, "_fetch", fetch)
    resolution.adapter_folder(Client(), Version())  # type: ignore[arg-type]
    assert fetched == [kept_folder("acme.bot", "4", "a" * 64)]
    assert left(kept) == ["3"]
