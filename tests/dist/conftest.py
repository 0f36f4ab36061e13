"""Fixtures of the tests that run on several ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megarl.parallel.environment import apply_environment
from megarl.parallel.platform import install_platform
from megarl.verify.pool import RankPool
from tests.dist.ranks import cpu_pool

# Test modules import megatron.core through megarl when pytest collects them: the platform has to be there first.
apply_environment()
install_platform()


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Yield the pool of four ranks that all tests share."""
    pool = cpu_pool(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.stop()
