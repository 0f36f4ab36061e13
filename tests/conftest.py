"""What the tests of whole runs share: the tiny task."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def tiny_task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny task, which the tests of one module may change and run in."""
    from tests.tiny_task import write_tiny_task  # here, since other tests shouldn't wait for transformers

    return write_tiny_task(tmp_path_factory.mktemp("tiny_task"))
