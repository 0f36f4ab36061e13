"""One rank of a pool: run cases until the pool hangs up."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from megarl.parallel.environment import apply_environment
from megarl.ranks.meeting import tcp_store

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined] # torch doesn't list it

    from megarl.parallel.platform import Platform


@dataclass(frozen=True)
class FileMeeting:
    """A file that isn't there yet, through which ranks of one machine find each other."""

    path: Path

    def store(self, world_size: int, timeout_s: float) -> Store:
        """Return the store of a world."""
        from torch.distributed import FileStore  # type: ignore[attr-defined] # torch doesn't list it

        return FileStore(str(self.path), world_size)


@dataclass(frozen=True)
class StoreMeeting:
    """The store of all ranks, in which those of a world find each other under a name."""

    host: str
    port: int
    name: str

    def store(self, world_size: int, timeout_s: float) -> Store:
        """Return the store of a world."""
        from torch.distributed import PrefixStore  # type: ignore[attr-defined] # torch doesn't list it

        return PrefixStore(self.name, tcp_store(self.host, self.port, timeout=timedelta(seconds=timeout_s)))


@dataclass(frozen=True)
class Case:
    """One function to run on the first ``world_size`` ranks. ``call`` is the pickled (function, arguments).

    meeting: where the ranks find each other. timeout_s: of each collective.
    """

    call: bytes
    world_size: int
    meeting: FileMeeting | StoreMeeting
    timeout_s: float


@dataclass(frozen=True)
class Outcome:
    """What became of a case on one rank: a pickled result or the text of an error, and when, by its node's clock.

    has_ended: whether the rank's process ends with it.
    """

    result: bytes = b""
    error: str = ""
    time_s: float = field(default_factory=time.time)
    has_ended: bool = False


def serve(rank: int, local_rank: int, connection: Connection, stacks: Path, environ: Mapping[str, str]) -> None:
    """Answer each case with an outcome.

    local_rank: the rank's number on its node. stacks: receives the stack of every thread on SIGUSR1. environ: variables
    that come before the platform's.
    """
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
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
            connection.send(_run(platform, rank, local_rank, case))


def _end_with_parent() -> None:
    """End this process with the one that started it, also within a case, whose collectives would wait for long."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run(platform: Platform, rank: int, local_rank: int, case: Case) -> Outcome:
    from megarl.parallel.world import enter_world, leave_world

    try:
        store = case.meeting.store(case.world_size, case.timeout_s)
        enter_world(platform, rank, case.world_size, store, case.timeout_s, local_rank)
        function, args = pickle.loads(case.call)
        return Outcome(result=pickle.dumps(function(*args)))
    except Exception:  # noqa: BLE001 - whoever asked reports it, whatever it is
        failed = Outcome(error=traceback.format_exc())
    # Ranks that wait for this one in a collective get an error at once.
    leave_world()
    return failed
