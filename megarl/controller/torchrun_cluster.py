"""The WorkerGroup under torchrun: rank 0 is the controller and a worker, the others serve it."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megarl.controller.rank import RunSpec, join_ranks, start_worker

_FOREVER = timedelta(days=30)  # a controller may score, validate or wait for long; a dead peer is noticed at once


def torchrun_rank() -> int | None:
    """Return this process's rank if torchrun started it."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else None


class TorchrunGroup:
    """The ranks that torchrun started. Rank 0 creates it with the run; the others learn the run from rank 0."""

    def __init__(self, run: RunSpec | None) -> None:
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
        own = self._scatter([(method, args) for args in arguments])
        return self._gather(getattr(self.worker, method)(*own[1]))

    def shutdown(self) -> None:
        """Let the serving ranks return."""
        self._scatter([("", ())] * self.world_size)
        self.worker.shutdown()

    def abort(self) -> None:
        """Do nothing: this process is about to fail, and torchrun then ends the others."""

    def serve(self) -> None:
        """Answer calls until the controller shuts down. A failure ends the process, and torchrun the others."""
        while True:
            method, args = self._scatter(None)
            if not method:
                self.worker.shutdown()
                return
            try:
                result = getattr(self.worker, method)(*args)
            except BaseException:  # noqa: BLE001 (reported, and the process ends)
                print(f"rank {self.rank} failed in {method}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
                os._exit(1)  # at once: a peer inside a collective must see the connection close
            self._gather(result)

    def _scatter(self, calls: list[tuple[str, tuple[Any, ...]]] | None) -> tuple[str, tuple[Any, ...]]:
        mine: list[Any] = [None]
        dist.scatter_object_list(mine, calls, src=0, group=self.control)
        call: tuple[str, tuple[Any, ...]] = mine[0]
        return call

    def _gather(self, result: Any) -> list[Any]:
        results: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(result, results, dst=0, group=self.control)
        return results or []
