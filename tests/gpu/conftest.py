"""Everything here needs a CUDA device; without one it is skipped, saying so."""

import os
import sys
from pathlib import Path

import pytest

# cuBLAS reads it once a process; the tests of bitwise equality need it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch

sys.path.append(str(Path(__file__).parents[1] / "distributed"))  # its small real runs
sys.path.append(str(Path(__file__).parents[1] / "unit"))  # its adapters and their merged models


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
