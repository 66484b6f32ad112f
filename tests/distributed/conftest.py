"""Pools of one, two and four gloo processes, made when a test first asks for them."""

from collections.abc import Iterator

import pytest
from gloo import GlooPool


@pytest.fixture(scope="session")
def one() -> Iterator[GlooPool]:
    pool = GlooPool(1)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def two() -> Iterator[GlooPool]:
    pool = GlooPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def four() -> Iterator[GlooPool]:
    pool = GlooPool(4)
    yield pool
    pool.close()
