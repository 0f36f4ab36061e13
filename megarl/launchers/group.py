"""How the controller reaches all ranks. It doesn't know whether Ray or torchrun placed them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class WorkerGroup(Protocol):
    """The ranks of a run, each with a Worker."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        ...

    def call(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call ``method`` of every rank's Worker with that rank's arguments; return the results by rank.

        Raises WorkerError with the first rank's traceback where one fails or dies. The group is dead afterwards.
        """
        ...

    def shutdown(self) -> None:
        """End all ranks after a run that went well."""
        ...

    def abort(self) -> None:
        """End all ranks at once, whatever they are doing."""
        ...
