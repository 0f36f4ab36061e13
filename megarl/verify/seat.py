"""A process that torchrun started, as a seat of the pool: it keeps a rank in a process of its own, which may end.

It does what the controller's orders say until the last one, or until the controller is gone.
"""

from __future__ import annotations

import pickle
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from megarl.errors import WorkerError
from megarl.nodes.facts import read_facts
from megarl.verify.board import Board, BoardLost, End, Here, Look, Order, Start, Stop
from megarl.verify.process import STACK_S, RankProcess, rank_context
from megarl.verify.rank import Case, Outcome

POLL_S = 0.05
BEAT_S, SILENCE_S = 2.0, 30.0


def here_in(environ: Mapping[str, str]) -> Here:
    """Return where this process is. torchrun numbers the nodes that it was started on; else they have names."""
    host = socket.gethostname()
    return Here(f"{environ.get('GROUP_RANK', '')} {host}", host, int(environ["LOCAL_RANK"]))


class Seat:
    """The seat of rank ``rank``. folder: of this process alone. lost: ends it, with the loss of the controller."""

    def __init__(self, rank: int, here: Here, board: Board, folder: Path, lost: Callable[[WorkerError], None]) -> None:
        self.rank, self.here, self.board, self.folder, self.lost = rank, here, board, folder, lost
        self._process: RankProcess | None = None
        self._has_left = threading.Event()

    def serve(self, heart: Board) -> None:
        """Follow orders to the last one. heart: a connection of its own, for signs of life."""
        threading.Thread(target=self._beat, args=(heart,), name="heart", daemon=True).start()
        number = 1
        try:
            self.board.arrive(self.rank, self.here)
            while True:
                while not self.board.is_told(number):
                    time.sleep(POLL_S)
                order = self.board.order(number)
                if isinstance(order, End):
                    break
                outcome = self._done(number, order)
                if outcome is not None:
                    self.board.answer(number, self.rank, outcome)
                number += 1
        except BoardLost as error:
            self._lose(str(error))
        finally:
            self._kill()
            self._has_left.set()
        with suppress(BoardLost):
            self.board.answer(number, self.rank, Outcome())

    def _done(self, number: int, order: Order) -> Outcome | None:
        """Do what an order says; return what came of it, None where it isn't for this rank."""
        match order:
            case Stop():
                self._kill()
                return Outcome()
            case Look(ranks, probe, paths) if self.rank in ranks:
                facts = read_facts(ranks.index(self.rank), "", paths, probe, self.folder)
                return Outcome(pickle.dumps(replace(facts, name=self.here.host)))
            case Start(with_engine, environ):
                self._kill()
                context = rank_context(with_engine)
                self._process = RankProcess(self.rank, self.here.local_rank, self.folder, context, environ)
                return self._finished(self._process, number)
            case Case(world_size=world_size) if self.rank < world_size:
                assert self._process is not None
                self._process.send(order)
                return self._finished(self._process, number)
        return None

    def _finished(self, process: RankProcess, number: int) -> Outcome:
        """Return the rank's outcome; an error with where it is when the controller goes on without it."""
        while not process.connection.poll(POLL_S):
            if self.board.is_told(number + 1):
                process.ask_for_stack()
                time.sleep(STACK_S)
                return process.unfinished()
        return process.outcome()

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process = None

    def _beat(self, heart: Board) -> None:
        """Give signs of life, and notice that the controller, which holds the store, gives none."""
        count = 0
        while not self._has_left.is_set():
            # Of a node without power nothing is heard, not even that a connection is closed.
            limit = threading.Timer(SILENCE_S, self._lose, (f"nothing is heard of it for {SILENCE_S:g} s",))
            limit.daemon = True
            limit.start()
            try:
                heart.beat(self.rank, count)
            except BoardLost as error:
                self._lose(str(error))
            limit.cancel()
            count += 1
            self._has_left.wait(BEAT_S)

    def _lose(self, why: str) -> None:
        if not self._has_left.is_set():
            self._has_left.set()
            self.lost(lost_controller(self.rank, self.here, why))


def lost_controller(rank: int, here: Here, why: str) -> WorkerError:
    """Return the error of a seat whose controller is gone."""
    return WorkerError(f"rank {rank} on {here.host} has lost its controller, rank 0: {why}")
