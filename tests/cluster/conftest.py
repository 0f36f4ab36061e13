"""What the tests of a cluster share: a Slurm of four nodes, and the environment that jobs get."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.mini_slurm import Job, MiniSlurm, missing

REPOSITORY = Path(__file__).resolve().parents[2]
NUM_NODES = 4


@dataclass(frozen=True)
class Cluster:
    """A Slurm, and a folder that all its nodes see."""

    slurm: MiniSlurm
    folder: Path

    def environ(self, **more: str) -> dict[str, str]:
        """Return the environment of a job, with ``more``."""
        python = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        own = {"PATH": python, "OMP_NUM_THREADS": "1", "MEGARL_PLATFORM": "cpu", "MEGARL_ROOT": str(REPOSITORY)}
        return {**own, **more}

    def run(self, folder: Path, script: str, *arguments: str, timeout_s: float = 60.0, **more: str) -> Job:
        """Return a job of a script of the repository after its end. Flags of sbatch come first among ``arguments``."""
        number = self.submit(folder, script, *arguments, **more)
        return self.slurm.wait(number, folder, timeout_s)

    def submit(self, folder: Path, script: str, *arguments: str, **more: str) -> str:
        """Return the number of a job, which may not have started yet."""
        split = next((i for i, word in enumerate(arguments) if not word.startswith("--")), len(arguments))
        flags, rest = arguments[:split], arguments[split:]
        return self.slurm.submit(folder, *flags, str(REPOSITORY / script), *rest, environ=self.environ(**more))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Bring up a Slurm for the tests of a module; skip them where this machine can't."""
    if lacks := missing():
        pytest.skip(f"no Slurm here: {', '.join(lacks)} missing (apt-get install slurm-wlm munge, and be root)")
    folder = tmp_path_factory.mktemp("slurm")
    shared = tmp_path_factory.mktemp("shared")
    slurm = MiniSlurm(folder, (REPOSITORY, Path(sys.prefix), shared), NUM_NODES)
    slurm.start()
    try:
        yield Cluster(slurm, shared)
    finally:
        slurm.stop()
