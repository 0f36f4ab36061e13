"""One rank of the pool: run cases until the pool hangs up."""

from __future__ import annotations

import faulthandler
import gc
import os
import pickle
import signal
import time
import traceback
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

from megarl.parallel.environment import apply_environment


@dataclass(frozen=True)
class Case:
    """One function to run on the first ``world_size`` ranks. ``call`` is the pickled (function, arguments).

    store: the file through which the ranks find each other. timeout_s: of each collective.
    """

    call: bytes
    world_size: int
    store: Path
    timeout_s: float


@dataclass(frozen=True)
class Outcome:
    """What became of a case on one rank: a pickled result or the text of an error, and when (one clock for all)."""

    result: bytes = b""
    error: str = ""
    time_s: float = field(default_factory=time.monotonic)


def serve(rank: int, connection: Connection, stacks: Path) -> None:
    """Answer each case with an outcome. ``stacks`` receives the stack of every thread on SIGUSR1."""
    # The same tests on every machine, also on one with GPUs.
    os.environ |= {"MEGARL_PLATFORM": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    apply_environment()
    import torch

    from megarl.parallel.platform import install_platform

    install_platform()
    import megatron.core.models.gpt
    import megatron.core.optimizer  # noqa: F401

    torch.set_num_threads(1)
    gc.freeze()  # so that collecting the garbage of a case doesn't look at all that was imported
    with stacks.open("w") as stacks_file:
        faulthandler.register(signal.SIGUSR1, stacks_file)
        connection.send(Outcome())
        while True:
            try:
                case = connection.recv()
            except EOFError:
                return  # the pool is gone
            # The world of the case before. A rank that closes its sockets while another still uses them breaks it,
            # and only now is it certain that all have finished.
            _leave_world()
            connection.send(_run(rank, case))


def _run(rank: int, case: Case) -> Outcome:
    try:
        _enter_world(rank, case)
        function, args = pickle.loads(case.call)
        return Outcome(result=pickle.dumps(function(*args)))
    except Exception:  # noqa: BLE001 - the test that asked reports it, whatever it is
        failed = Outcome(error=traceback.format_exc())
    # Ranks that wait for this one in a collective get an error at once.
    _leave_world()
    return failed


def _enter_world(rank: int, case: Case) -> None:
    """Join a fresh world of exactly ``world_size`` ranks."""
    import torch
    from torch.distributed import FileStore  # type: ignore[attr-defined] # torch doesn't list it

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(case.world_size))
    torch.manual_seed(0)  # what a case draws doesn't depend on the cases before it
    torch.distributed.init_process_group(
        "gloo",
        store=FileStore(str(case.store), case.world_size),
        rank=rank,
        world_size=case.world_size,
        timeout=timedelta(seconds=case.timeout_s),
    )
    # A rank that leaves while another is still connecting to it would leave that one waiting.
    torch.distributed.barrier()


def _leave_world() -> None:
    """Leave nothing of the world behind, if there is one."""
    import torch
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    # Models are cyclic garbage and hold their groups, whose threads would wake up a hundred times a second for good.
    gc.collect()
