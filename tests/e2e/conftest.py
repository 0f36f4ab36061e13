"""What the end-to-end tests share: the tiny task."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_task import write_tiny_task


@pytest.fixture(scope="session")
def tiny_task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the tiny task."""
    return write_tiny_task(tmp_path_factory.mktemp("tiny_task"))
