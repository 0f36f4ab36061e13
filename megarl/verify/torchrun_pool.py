"""The pool of ranks that torchrun started, or anything else that starts one process a rank, on one node or on several.

Rank 0's process is the controller and a seat, the others are seats. What they tell each other travels through the
store of the ranks, and how ranks of a world find each other: pickles of their own, at an address of rank 0's node.
"""

from __future__ import annotations

import math
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import NoReturn, TypeVar

from megarl.errors import ResourceError, WorkerError
from megarl.launchers.starter import has_peers
from megarl.nodes.facts import NodeFacts, differences
from megarl.parallel.environment import PRODUCTS, platform_environment
from megarl.ranks.meeting import store_of_ranks, tcp_store
from megarl.ranks.watched import START_S
from megarl.verify.board import Board, End, Here, Look, Order, Start, Stop
from megarl.verify.pool import GRACE_S, START_OF_RANKS, name_of_call, succeeded
from megarl.verify.rank import Case, Outcome
from megarl.verify.seat import BEAT_S, POLL_S, SILENCE_S, Seat, here_in, lost_controller

T = TypeVar("T")

ANSWER_S = 10.0  # for a seat to do what takes it no time
CLOSE_S = 2.0  # of what a launcher leaves a process that it tells to end
LOOK_S = 60.0
_OWN_FOLDER = "megarl_verify_"


class TorchrunPool:
    """A Pool of one rank for each process that was started. A rank that hangs or dies is replaced; a seat isn't."""

    def __init__(self, board: Board, seats: Sequence[Here], *, with_engine: bool) -> None:
        """Take note of the seats, by rank. with_engine: whether ranks are to have an engine's imports."""
        self.seats, self._board, self._with_engine = seats, board, with_engine
        self._number = self._num_cases = 0
        self._has_ranks = self._is_closed = False
        self._lost = set[int]()

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return len({seat.node for seat in self.seats})

    @property
    def ranks_together(self) -> int:
        """Number of ranks of which every so many, counted from the first, are on one node."""
        return math.gcd(*(len(list(ranks)) for _, ranks in groupby(seat.node for seat in self.seats)))

    def run(self, function: Callable[..., T], *args: object, world_size: int = 4, timeout_s: float = 120.0) -> list[T]:
        """Run ``function(*args)`` on the first ranks, as Pool says.

        Raises WorkerError where a seat is lost; the pool is of no use afterwards.
        """
        assert 1 <= world_size <= len(self.seats), f"the pool has {len(self.seats)} ranks, not {world_size}"
        call = pickle.dumps((function, args))
        if not self._has_ranks:
            self._has_ranks = True
            environ = platform_environment()
            products = {PRODUCTS: environ[PRODUCTS]} if PRODUCTS in environ else {}  # ranks on all nodes compute alike
            self._finish(Start(self._with_engine, products), self._all, START_OF_RANKS, START_S)
        self._num_cases += 1
        case = Case(call, world_size, self._board.meeting(f"world{self._num_cases}"), timeout_s)
        outcomes = self._finish(case, range(world_size), name_of_call(function), timeout_s)
        return [pickle.loads(outcome.result) for outcome in outcomes]

    def stop(self) -> None:
        """End every rank, until the next case. Raises WorkerError where a seat is lost."""
        if self._has_ranks and not self._lost:
            self._end_ranks("the end of the ranks", {})

    def check_folders(self, scratch: Path, models: Sequence[Path]) -> None:
        """Raise ResourceError unless all nodes see ``scratch``, have the same ``models``, and are alike in versions."""
        probe = scratch / "seen"
        probe.touch()
        nodes = [seat.node for seat in self.seats]
        look = Look(tuple(nodes.index(node) for node in dict.fromkeys(nodes)), probe, tuple(models))
        outcomes = self._finish(look, look.ranks, "a look at the nodes", LOOK_S)
        facts: list[NodeFacts] = [pickle.loads(outcome.result) for outcome in outcomes]
        fix = "start the command in a folder on one, or --scratch=FOLDER"
        num_devices = max(map(nodes.count, nodes))
        if wrong := list(differences(facts, num_devices, scratch, fix)):
            raise ResourceError("\n".join(dict.fromkeys(wrong)))
        probe.unlink()

    def close(self) -> None:
        """End every rank and its seat, and wait for those that can be reached."""
        if not self._is_closed:
            self._is_closed = True
            self._tell(End())
            self._heard(self._number, self._all - self._lost, CLOSE_S)

    def _finish(self, order: Order, ranks: Collection[int], what: str, timeout_s: float) -> list[Outcome]:
        """Return the outcomes by rank. Stops the pool unless every rank is alive and idle again."""
        self._tell(order)
        number = self._number
        outcomes = self._heard(number, ranks, timeout_s)
        if len(outcomes) < len(ranks):
            # With the next order before it's their turn, those that haven't finished say where they are.
            self._end_ranks(what, outcomes)
            outcomes |= self._heard(number, set(ranks) - outcomes.keys(), ANSWER_S)
        elif any(outcome.has_ended for outcome in outcomes.values()):
            self._end_ranks(what, outcomes)
        return succeeded(outcomes, what)

    def _end_ranks(self, what: str, outcomes: Mapping[int, Outcome]) -> None:
        """End every rank. Raises WorkerError, with the errors in ``outcomes`` of ``what``, where a seat is lost."""
        self._has_ranks = False
        self._tell(Stop())
        self._lost = self._all - self._heard(self._number, self._all, ANSWER_S).keys()
        if self._lost:
            who = ", ".join(f"rank {rank} on {self.seats[rank].host}" for rank in sorted(self._lost))
            told = [f"--- rank {rank} {outcome.error}" for rank, outcome in outcomes.items() if outcome.error]
            raise WorkerError(
                f"{who} can't be reached in {what}: the process that was started there has died, it is stopped, or its "
                f"node is lost\n{''.join(told)}".rstrip()
            )

    def _tell(self, order: Order) -> None:
        self._number += 1
        self._board.tell(self._number, order)

    def _heard(self, number: int, ranks: Collection[int], timeout_s: float) -> dict[int, Outcome]:
        """Return outcomes by rank, within ``timeout_s`` or ``GRACE_S`` after an error, or of all but silent seats."""
        outcomes: dict[int, Outcome] = {}
        deadline_s = time.monotonic() + timeout_s
        pulse = Pulse(self._board)
        while (waiting := set(ranks) - outcomes.keys()) and time.monotonic() < deadline_s:
            found = self._board.answers(number, waiting)
            outcomes |= found
            if any(outcome.error for outcome in found.values()):
                deadline_s = min(deadline_s, time.monotonic() + GRACE_S)
            if pulse.are_silent(waiting - found.keys()):
                break
            if not found:
                time.sleep(POLL_S)
        return outcomes

    @property
    def _all(self) -> set[int]:
        return set(range(len(self.seats)))


class Pulse:
    """The signs of life of seats, and how long each has given none."""

    def __init__(self, board: Board) -> None:
        self._board, self._read_s = board, time.monotonic()
        self._last: dict[int, tuple[bytes | None, float]] = {}

    def are_silent(self, ranks: Collection[int]) -> bool:
        """Whether one of ``ranks`` has given no sign of life for ``SILENCE_S``."""
        now_s = time.monotonic()
        if now_s - self._read_s < BEAT_S:
            return False
        self._read_s, beats = now_s, self._board.beats(ranks)
        for rank in ranks:
            if rank not in self._last or self._last[rank][0] != beats[rank]:
                self._last[rank] = beats[rank], now_s
        return any(now_s - self._last[rank][1] > SILENCE_S for rank in ranks)


@contextmanager
def torchrun_pool(*, with_engine: bool) -> Iterator[TorchrunPool]:
    """Yield the pool of all ranks that were started, once all are there. This process is rank 0.

    Raises WorkerError where some don't come.
    """
    signal.signal(signal.SIGTERM, _told_to_end)
    with tempfile.TemporaryDirectory(prefix=_OWN_FOLDER) as folder:
        store = store_of_ranks(None)
        board, *more = (Board(store), *(Board(tcp_store(store.host, store.port)) for _ in range(2)))
        seat = Seat(0, here_in(os.environ), more[0], Path(folder), lambda error: None)
        threading.Thread(target=seat.serve, args=(more[1],), name="seat", daemon=True).start()
        pool = TorchrunPool(board, _arrived(board, int(os.environ["WORLD_SIZE"])), with_engine=with_engine)
        try:
            yield pool
        finally:
            pool.close()


def serve() -> None:
    """Be the seat of a rank other than 0 until the controller ends it, or has ended."""
    rank, here = int(os.environ["RANK"]), here_in(os.environ)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda found, _: sys.exit(128 + found))
    with tempfile.TemporaryDirectory(prefix=_OWN_FOLDER) as name:
        folder = Path(name)

        def lost(error: WorkerError) -> None:
            if here.local_rank == 0:  # once a node
                print(f"WorkerError: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            os._exit(1)

        try:
            store = store_of_ranks(None)
            boards = [Board(store), Board(tcp_store(store.host, store.port))]
        except (RuntimeError, OSError) as error:  # rank 0 never came, or has said why it ended
            lost(lost_controller(rank, here, str(error)))
        Seat(rank, here, boards[0], folder, lost).serve(boards[1])


def _arrived(board: Board, world_size: int) -> list[Here]:
    """Return all seats by rank. Raises WorkerError where some aren't there in time."""
    seats: dict[int, Here] = {}
    deadline_s = time.monotonic() + START_S
    while len(seats) < world_size:
        seats |= board.arrived(set(range(world_size)) - seats.keys())
        if time.monotonic() > deadline_s:
            absent = ", ".join(str(rank) for rank in range(world_size) if rank not in seats)
            raise WorkerError(f"of {world_size} ranks {absent} didn't come within {START_S:g} s")
        time.sleep(POLL_S)
    return [seats[rank] for rank in range(world_size)]


def _told_to_end(number: int, frame: FrameType | None) -> NoReturn:
    """End the command, with all that it started. torchrun ends the ranks of a node where one has ended."""
    if has_peers():
        sys.exit(128 + number)
    raise WorkerError("a process that torchrun started on this node has ended; torchrun's report says which and how")
