"""The pool of rank processes of the tests: four ranks on CPU, also on a machine with GPUs."""

from __future__ import annotations

from pathlib import Path

from megarl.verify.pool import RankPool
from tests.processes import CONTEXT


def cpu_pool(folder: Path, size: int = 4) -> RankPool:
    """Return a pool of ``size`` ranks that runs functions of test modules."""
    return RankPool(folder, size, CONTEXT, {"MEGARL_PLATFORM": "cpu", "CUDA_VISIBLE_DEVICES": ""})
