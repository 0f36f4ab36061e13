"""What makes many tests quicker, and what the tests of whole runs share: the tiny task."""

from __future__ import annotations

import functools
import gc
from pathlib import Path

import omegaconf._utils
import omegaconf.base
import pytest

# Hundreds of tests compose the same config: each interpolation in it is parsed once a process.
for module in (omegaconf.base, omegaconf._utils):
    module.parse = functools.cache(module.parse)


def pytest_collection_finish() -> None:
    """Have Python's collector leave alone what was imported: it stays."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def tiny_task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny task, which the tests of one module may change and run in."""
    from tests.tiny_task import write_tiny_task  # here, since other tests shouldn't wait for transformers

    return write_tiny_task(tmp_path_factory.mktemp("tiny_task"))
