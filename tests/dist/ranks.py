"""Ranks of tests: a pool of four on CPU, also on a machine with GPUs; programs that start ranks of their own."""

from __future__ import annotations

from pathlib import Path

from megarl.verify.pool import RankPool
from tests.forked import ROOT, run_forked
from tests.processes import CONTEXT


def cpu_pool(folder: Path, size: int = 4) -> RankPool:
    """Return a pool of ``size`` ranks that runs functions of test modules."""
    return RankPool(folder, size, CONTEXT, {"MEGARL_PLATFORM": "cpu", "CUDA_VISIBLE_DEVICES": ""})


def run_case(module: str, *arguments: object) -> None:
    """Run ``module`` as a program, which starts ranks of its own; fail with all that it printed unless it ends well."""
    ended = run_forked("run", ("-m", module, *map(str, arguments)), ROOT, timeout_s=240)
    assert ended.code == 0, ended.output
