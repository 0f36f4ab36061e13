"""What the controller and the seats of a pool tell each other through the store of the ranks, under its own names."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megarl.verify.rank import Case, Outcome, StoreMeeting

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined] # torch doesn't list it


@dataclass(frozen=True)
class Here:
    """Where a seat is. node: what no other node is called. local_rank: its number there."""

    node: str
    host: str
    local_rank: int


@dataclass(frozen=True)
class Start:
    """Start a rank, with an engine's imports or without. environ: variables that all ranks have alike."""

    with_engine: bool
    environ: Mapping[str, str]


@dataclass(frozen=True)
class Look:
    """Say, as one of ``ranks``, what the node is. probe: a file that the controller wrote. paths: of models."""

    ranks: tuple[int, ...]
    probe: Path
    paths: tuple[Path, ...]


@dataclass(frozen=True)
class Stop:
    """End the rank."""


@dataclass(frozen=True)
class End:
    """End the rank, and the seat."""


Order = Start | Case | Look | Stop | End


class BoardLost(Exception):
    """The store is gone, with rank 0 that held it."""


class Board:
    """A connection to the store. Orders are numbered from 1. Every method raises BoardLost where it ends."""

    def __init__(self, store: TCPStore) -> None:
        self._store = store

    def meeting(self, name: str) -> StoreMeeting:
        """Return the StoreMeeting of a world with a name that no other has."""
        return StoreMeeting(self._store.host, self._store.port, name)

    def arrive(self, rank: int, here: Here) -> None:
        """Say that a seat is there."""
        self._set(f"here/{rank}", json.dumps(asdict(here)).encode())

    def arrived(self, ranks: Iterable[int]) -> dict[int, Here]:
        """Return the seats of ``ranks`` that are there."""
        found = {rank: self._found(f"here/{rank}") for rank in ranks}
        return {rank: Here(**json.loads(content)) for rank, content in found.items() if content is not None}

    def tell(self, number: int, order: Order) -> None:
        """Give all seats an order."""
        self._set(f"order/{number}", pickle.dumps(order))

    def is_told(self, number: int) -> bool:
        """Whether there is an order of that number."""
        with _losses_named():
            return bool(self._store.check([f"order/{number}"]))

    def order(self, number: int) -> Order:
        """Return an order that is told."""
        content = self._found(f"order/{number}")
        assert content is not None
        order: Order = pickle.loads(content)
        return order

    def answer(self, number: int, rank: int, outcome: Outcome) -> None:
        """Say what came of an order."""
        self._set(f"answer/{number}/{rank}", pickle.dumps(outcome))

    def answers(self, number: int, ranks: Iterable[int]) -> dict[int, Outcome]:
        """Return the outcomes of an order by rank, of those of ``ranks`` that have answered, and forget them."""
        found: dict[int, Outcome] = {}
        for rank in ranks:
            key = f"answer/{number}/{rank}"
            if (content := self._found(key)) is not None:
                found[rank] = pickle.loads(content)
                with _losses_named():
                    self._store.delete_key(key)
        return found

    def beat(self, rank: int, count: int) -> None:
        """Give a sign of life."""
        self._set(f"beat/{rank}", str(count).encode())

    def beats(self, ranks: Iterable[int]) -> dict[int, bytes | None]:
        """Return the last sign of life of each of ``ranks``."""
        return {rank: self._found(f"beat/{rank}") for rank in ranks}

    def _set(self, key: str, content: bytes) -> None:
        with _losses_named():
            self._store.set(key, content)  # type: ignore[arg-type] # it takes bytes as they are

    def _found(self, key: str) -> bytes | None:
        """Return the content of a key, None where it has none."""
        with _losses_named():
            return self._store.get(key) if self._store.check([key]) else None


@contextmanager
def _losses_named() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, OSError) as error:  # torch's errors of a store are RuntimeErrors
        raise BoardLost(str(error).partition("\n")[0]) from error
