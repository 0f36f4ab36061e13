"""How the controller calls ranks. It doesn't know whether Ray or torchrun placed them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from megarl.launchers.watchdog import Watchdog
    from megarl.ranks.worker import Worker

A = TypeVar("A")
T = TypeVar("T")


class Futures(Protocol[T]):
    """The answers of all ranks to one call."""

    def result(self) -> list[T]:
        """Wait for all ranks, and return their answers by rank.

        Raises WorkerError with the first rank's traceback where one fails or dies, and with where every rank stands
        where that takes longer than trainer.hang_timeout_s. The group is dead afterwards.
        """
        ...


class WorkerGroup(Protocol):
    """Ranks with a Worker each."""

    @property
    def watchdog(self) -> Watchdog:
        """What watches over the ranks."""
        ...

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        ...

    def submit(self, verb: Callable[[Worker, A], T], arguments: Sequence[A]) -> Futures[T]:
        """Have every rank's Worker run ``verb``, as in ``submit(Worker.update, work_by_rank)``; don't wait.

        arguments: by rank. Ranks that are given the same object share one copy: it leaves this process once.
        Ranks run calls in the order in which they were submitted.
        """
        ...

    def shutdown(self) -> None:
        """End all ranks after a run that went well."""
        ...

    def abort(self, cause: BaseException) -> None:
        """End all ranks at once, whatever they are doing, because of ``cause``."""
        ...


def everywhere(group: WorkerGroup, verb: Callable[[Worker, A], T], argument: A) -> list[T]:
    """Return the answers of all ranks, given the same argument each."""
    return group.submit(verb, [argument] * group.world_size).result()
