"""One rank of a pool: run cases until the pool hangs up."""

from __future__ import annotations

import faulthandler
import gc
import os
import pickle
import signal
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from megarl.parallel.environment import apply_environment

if TYPE_CHECKING:
    from megarl.parallel.platform import Platform


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


def serve(rank: int, connection: Connection, stacks: Path, environ: Mapping[str, str]) -> None:
    """Answer each case with an outcome.

    stacks: receives the stack of every thread on SIGUSR1. environ: variables that come before the platform's.
    """
    os.environ.update(environ)
    apply_environment()
    import torch

    from megarl.parallel.platform import install_platform

    platform = install_platform()
    import megarl.train.megatron.backend  # noqa: F401 - imports Megatron, which takes long, before the first case
    from megarl.parallel.world import leave_world

    if platform.name == "cpu":
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
            leave_world()
            connection.send(_run(platform, rank, case))


def _run(platform: Platform, rank: int, case: Case) -> Outcome:
    from megarl.parallel.world import enter_world, leave_world

    try:
        enter_world(platform, rank, case.world_size, case.store, case.timeout_s)
        function, args = pickle.loads(case.call)
        return Outcome(result=pickle.dumps(function(*args)))
    except Exception:  # noqa: BLE001 - whoever asked reports it, whatever it is
        failed = Outcome(error=traceback.format_exc())
    # Ranks that wait for this one in a collective get an error at once.
    leave_world()
    return failed
