"""The WorkerGroup under torchrun: rank 0 is the controller and a worker, the others serve it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from megarl.errors import MegarlError
from megarl.launchers.failure import failures_named
from megarl.ranks.spec import RunSpec, join_ranks, start_worker

_FOREVER = timedelta(days=30)  # a controller may score, validate or wait for long; a dead peer is noticed at once
_END_BY_TORCHRUN_S = 10.0  # torchrun ends all ranks of a node within a second of one's death


def serve() -> None:
    """Be a rank other than 0 until the run ends. A failure ends the process, and torchrun the others."""
    try:
        TorchrunGroup(None).serve()
    except MegarlError as error:
        print(f"{type(error).__name__} on rank {os.environ['RANK']}: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # at once: a peer inside a collective must see the connection close


class TorchrunGroup:
    """The ranks that torchrun started. Rank 0 creates it with the run; the others learn the run from rank 0."""

    def __init__(self, run: RunSpec | None) -> None:
        with _failures_named("the start"):
            platform = join_ranks()
            self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
            # Calls travel in a group of their own, apart from the collectives of models and engine.
            self.control = dist.new_group(backend="gloo", timeout=_FOREVER)
            runs = [run]
            dist.broadcast_object_list(runs, src=0, group=self.control)
            assert runs[0] is not None
            self.worker = start_worker(runs[0], platform)

    def call(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call ``method`` on every rank, as WorkerGroup says."""
        with _failures_named(method):
            _, own = self._scatter([(method, args) for args in arguments])
            return self._gather(getattr(self.worker, method)(*own))

    def shutdown(self) -> None:
        """Let the serving ranks return."""
        with _failures_named("shutdown"):
            self._scatter([("", ())] * self.world_size)
            self.worker.shutdown()

    def abort(self) -> None:
        """Do nothing: this process is about to fail, and torchrun then ends the others."""

    def serve(self) -> None:
        """Answer calls until the controller shuts down."""
        method = "a wait for the next call"
        while method:
            with _failures_named(method):
                method, args = self._scatter(None)
            with _failures_named(method):
                if method:
                    self._gather(getattr(self.worker, method)(*args))
        with _failures_named("shutdown"):
            self.worker.shutdown()

    def _scatter(self, calls: list[tuple[str, tuple[Any, ...]]] | None) -> tuple[str, tuple[Any, ...]]:
        mine: list[Any] = [None]
        dist.scatter_object_list(mine, calls, src=0, group=self.control)
        call: tuple[str, tuple[Any, ...]] = mine[0]
        return call

    def _gather(self, result: Any) -> list[Any]:
        results: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(result, results, dst=0, group=self.control)
        return results or []


@contextmanager
def _failures_named(method: str) -> Iterator[None]:
    """Name a failure and give it to torchrun, whose report ends the output; let that of a lost peer be heard first."""
    with failures_named(method):
        try:
            yield
        except MegarlError:
            raise
        except Exception as error:
            if _is_loss_of_a_peer(error):
                time.sleep(_END_BY_TORCHRUN_S)
            get_error_handler().record_exception(error)
            raise


def _is_loss_of_a_peer(error: Exception) -> bool:
    """Whether a collective failed because another rank is gone. gloo raises plain RuntimeErrors from its sources."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))
