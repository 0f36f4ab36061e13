"""Ranks whose Megatron finds Transformer Engine: processes of their own, since it looks for it while it is imported.

The platform is the CPU's, and Transformer Engine's compiled part is emulated.
"""

from __future__ import annotations

import gc
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[3]
TIMEOUT_S = 240.0


@dataclass(frozen=True)
class TeCase:
    """A module-level function to call on ranks of a world of their own; all must pickle."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    world_size: int = 1


def run_with_te(folder: Path, source: Path, cases: dict[str, TeCase]) -> dict[str, list[Any]]:
    """Return what each case returned on its ranks. folder: for files. source: of a release of Transformer Engine."""
    (folder / "cases.pickle").write_bytes(pickle.dumps(cases))
    num_ranks = max(case.world_size for case in cases.values())
    environ = os.environ | {"MEGARL_PLATFORM": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    logs = [(folder / f"rank{rank}.log").open("w+") for rank in range(num_ranks)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.dist.cuda.te_process", str(folder), str(rank), str(source)],
            cwd=REPOSITORY,
            env=environ,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(TIMEOUT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    told = []
    for log in logs:
        log.seek(0)
        told.append(log.read())
        log.close()
    assert not any(codes), "\n".join(told)
    answers = [pickle.loads((folder / f"rank{rank}.pickle").read_bytes()) for rank in range(num_ranks)]
    return {name: [answers[rank][name] for rank in range(case.world_size)] for name, case in cases.items()}


def _serve(folder: Path, rank: int, source: Path) -> None:
    from megarl.parallel.environment import apply_environment

    apply_environment()
    import torch

    from tests.dist.cuda.te_kernels import import_transformer_engine

    import_transformer_engine(source)
    from megarl.parallel.platform import install_platform

    platform = install_platform()
    torch.set_num_threads(1)
    from torch.distributed import FileStore  # type: ignore[attr-defined] # torch doesn't list it

    from megarl.parallel.world import enter_world, leave_world

    gc.freeze()  # so that collecting the garbage of a case doesn't look at all that was imported
    cases = pickle.loads((folder / "cases.pickle").read_bytes())
    answers = {}
    for name, case in cases.items():
        if rank < case.world_size:
            store = FileStore(str(folder / f"store-{name}"), case.world_size)
            enter_world(platform, rank, case.world_size, store, TIMEOUT_S, local_rank=rank)
            answers[name] = case.function(*case.arguments)
            if torch.distributed.is_initialized():  # a rank that leaves first breaks the others' connections
                torch.distributed.barrier()
            leave_world()
    (folder / f"rank{rank}.pickle").write_bytes(pickle.dumps(answers))


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
