"""Engines in processes of their own: who does what, what they run, and what happens where one dies.

Each engine has a thread that starts it, hears it and, where it dies, starts another in its place, which gets the
weights that the others run. What the dead one hadn't finished goes to whoever has the least to do.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count

from megarl.controller.engines import Ended, unheard
from megarl.errors import PublishError, WorkerError
from megarl.launchers.engine_processes import EngineLost, RunningEngine
from megarl.monitor.trace import GENERATE
from megarl.rollout.engine import UNPUBLISHED
from megarl.rollout.served import Answer, Ask, Done, Order, Ready, Rest, Rested, Take, Took, samplings
from megarl.types import GenerationRequest, Group, Rollout, Sampling

_START_S = 600.0  # at least, for an engine to start
_POLL_S = 0.2
_MAX_LOSSES = 3  # of one engine in a row, without a rollout in between


@dataclass
class _Seat:
    """The place of an engine, which another takes where one dies.

    version: of the weights that it runs. is_taking: whether it is told to take others. is_resting: whether it is told
    to give its memory back. asked: what it hasn't finished, by number. begun: the version that it ran when it was asked
    for that. owes_since_s: since when nothing was heard of it though something is due. losses: why engines died here,
    one after another. is_late: whether it was started again after it had been given up, and the others don't wait for
    it to take weights.
    """

    number: int
    engine: RunningEngine | None = None
    is_ready: bool = False
    is_taking: bool = False
    is_resting: bool = False
    is_gone: bool = False
    is_late: bool = False
    version: int = UNPUBLISHED
    asked: dict[int, Ask] = field(default_factory=dict)
    begun: dict[int, int] = field(default_factory=dict)
    owes_since_s: float = 0.0
    losses: list[str] = field(default_factory=list)

    @property
    def does(self) -> str:
        """What it does, in a word; nothing where it waits, or is gone."""
        if self.is_gone:
            return ""
        if not self.is_ready:
            return "start"
        return "take weights" if self.is_taking else GENERATE if self.asked else ""

    @property
    def num_tokens(self) -> int:
        """Tokens that it may still have to compute."""
        return sum(_num_tokens(ask) for ask in self.asked.values())


class ServedEngines:
    """The engines of a run.

    start: starts the processes of the engine of a number. timeout_s: how long one may say nothing while something is
    due. tell: tells a person, in the thread that asks for rollouts. does: hears what the engine of a number does and
    with the weights of which publication, in any thread, whenever that changes and again. shares_devices: whether they
    are on the trainer's, and rest while that trains.
    """

    def __init__(
        self,
        start: Callable[[int], RunningEngine],
        num_engines: int,
        timeout_s: float,
        tell: Callable[[str], None],
        does: Callable[[int, str, int], None] = lambda number, what, policy_version: None,
        *,
        shares_devices: bool = False,
    ) -> None:
        self.timeout_s, self.tell, self.does, self.shares_devices = timeout_s, tell, does, shares_devices
        self._start = start
        self._changed = threading.Condition()
        self._seats = [_Seat(number) for number in range(num_engines)]
        self._numbers = count()
        self._waiting: list[Ask] = []
        self._done: dict[tuple[int, int], Rollout] = {}
        self._hears: dict[int, Callable[[Rollout], None]] = {}
        self._current: Take | None = None
        self._failure: BaseException | None = None
        self._notes: list[str] = []
        self._has_ended = self._are_resting = False
        self._threads = [threading.Thread(target=self._keep, args=(seat,), daemon=True) for seat in self._seats]
        for thread in self._threads:
            thread.start()

    @property
    def policy_version(self) -> int:
        """Number of the last publication, or ``UNPUBLISHED``."""
        return UNPUBLISHED if self._current is None else self._current.policy_version

    def ask(self, requests: Sequence[GenerationRequest], sampling: Sampling, ended: Ended = unheard) -> tuple[Ask, ...]:
        """Have the rollouts of every request sampled; don't wait. ended: hears of each, in a thread of its engine."""
        indices = tuple(range(len(samplings(sampling))))
        with self._changed:
            asks = tuple(Ask(next(self._numbers), request, sampling, indices) for request in requests)
            self._hears |= {ask.number: partial(ended, place) for place, ask in enumerate(asks)}
            self._waiting += asks
            self._end_rest()
            self._hand_out()
        return asks

    def collect(self, asks: Sequence[Ask]) -> list[Group]:
        """Wait for the rollouts of what was asked, and return them in order, once."""
        keys = [[(ask.number, index) for index in ask.indices] for ask in asks]
        with self._changed:
            self._wait_until(lambda: all(key in self._done for group in keys for key in group))
            return [self._collected(ask) for ask in asks]

    def collect_complete(self, asks: Sequence[Ask], least: int) -> dict[int, Group]:
        """Wait for the groups of ``least`` asks; return all that are complete, by number, once each."""

        def is_complete(ask: Ask) -> bool:
            return all((ask.number, index) in self._done for index in ask.indices)

        with self._changed:
            self._wait_until(lambda: sum(map(is_complete, asks)) >= least)
            complete = [ask for ask in asks if is_complete(ask)]
            return {ask.number: self._collected(ask) for ask in complete}

    def before_writing(self) -> None:
        """Wait until no engine reads the weights that are about to be written over, and let none begin."""
        with self._changed:
            self._current = None
            self._wait_until(lambda: not any(seat.is_taking for seat in self._seats))

    def take(self, order: Take) -> None:
        """Have all engines go on with these weights; return when they do."""
        with self._changed:
            self._current, self._are_resting = order, False
            for seat in self._seats:
                if seat.is_ready:
                    self._have_taken(seat, order)
            version = order.policy_version
            self._wait_until(lambda: all(s.is_gone or s.is_late or s.version == version for s in self._seats))

    def start_again(self, numbers: Sequence[int]) -> None:
        """Start engines of these numbers once more, also where they are given up; don't wait for them."""
        for seat in (self._seats[number] for number in numbers):
            with self._changed:
                was_gone, seat.is_late = seat.is_gone, True
                seat.losses.clear()
            if was_gone:
                self._threads[seat.number].join()
                seat.is_gone = False
                self._threads[seat.number] = threading.Thread(target=self._keep, args=(seat,), daemon=True)
                self._threads[seat.number].start()

    def wait_until_ready(self) -> None:
        """Wait until all engines have started."""
        with self._changed:
            self._wait_until(lambda: all(seat.is_ready or seat.is_gone for seat in self._seats))

    def rest(self) -> None:
        """Have all engines give the trainer's devices back, and wait until they have; those that start then, too.

        Nothing is asked for. They are back with the next ask or publication.
        """
        if not self.shares_devices:
            return
        with self._changed:
            assert not self._waiting and not any(seat.asked for seat in self._seats)
            self._are_resting = True
            for seat in self._seats:
                if seat.is_ready:
                    seat.is_resting = True
                    self._order(seat, Rest())
            self._wait_until(lambda: not any(seat.is_resting for seat in self._seats))

    def close(self) -> None:
        """End all engines."""
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _wait_until(self, is_so: Callable[[], bool]) -> None:
        """Wait for what the engines do. Raises what ended one for good, or all."""
        while True:
            notes, self._notes = self._notes, []
            for note in notes:
                self.tell(note)
            if self._failure is not None:
                raise self._failure
            if is_so():
                return
            self._changed.wait(_POLL_S)

    def _collected(self, ask: Ask) -> Group:
        """Return the rollouts of a complete ask, of which nothing is kept."""
        del self._hears[ask.number]
        return tuple(self._done.pop((ask.number, index)) for index in ask.indices)

    def _end_rest(self) -> None:
        """Have engines that have started while others rested take the weights that the others run."""
        was_resting, self._are_resting = self._are_resting, False
        if was_resting and self._current is not None:
            for seat in self._seats:
                if seat.is_ready and seat.version != self._current.policy_version:
                    self._have_taken(seat, self._current)

    def _hand_out(self) -> None:
        """Give what waits to the engines that run the current weights, to the one with the least to do first."""
        current = None if self._current is None else self._current.policy_version
        able = [seat for seat in self._seats if seat.is_ready and seat.version == current]
        given: dict[int, list[Ask]] = {}
        while self._waiting and able:
            ask = self._waiting.pop(0)
            seat = min(able, key=lambda seat: seat.num_tokens)
            seat.asked[ask.number], seat.begun[ask.number] = ask, seat.version
            self._say(seat)
            given.setdefault(seat.number, []).append(ask)
        for number, asks in given.items():
            self._order(self._seats[number], tuple(asks))

    def _have_taken(self, seat: _Seat, order: Take) -> None:
        seat.is_taking = True
        self._say(seat)
        self._order(seat, order)

    def _say(self, seat: _Seat) -> None:
        self.does(seat.number, seat.does, seat.version)

    def _order(self, seat: _Seat, order: Order) -> None:
        seat.owes_since_s = time.monotonic()
        assert seat.engine is not None
        with suppress(EngineLost):  # its thread hears of that as well
            seat.engine.send(order)

    def _keep(self, seat: _Seat) -> None:
        """Have an engine in a seat until the end, or until it is given up."""
        while not self._has_ended and not seat.is_gone:
            seat.engine = None
            try:
                seat.engine = self._start(seat.number)
                self._hear(seat, seat.engine)
            except EngineLost as lost:
                with self._changed:
                    self._note_loss(seat, str(lost))
            except PublishError as error:
                with self._changed:
                    self._failure, seat.is_gone = PublishError(f"engine {seat.number}: {error}"), True
                    self._changed.notify_all()
            except BaseException as error:  # noqa: BLE001 - it ends the run, in the thread that waits for rollouts
                with self._changed:
                    self._failure, seat.is_gone = error, True
                    self._changed.notify_all()
            finally:
                if seat.engine is not None:
                    seat.engine.kill()

    def _hear(self, seat: _Seat, engine: RunningEngine) -> None:
        """Take what an engine says until the end. Raises EngineLost where it dies, or says nothing for too long."""
        with self._changed:
            seat.owes_since_s = time.monotonic()
            self._say(seat)
        while not self._has_ended:
            answer = engine.receive(_POLL_S)
            with self._changed:
                if answer is None:
                    self._check_silence(seat)
                    continue
                seat.owes_since_s = time.monotonic()
                self._heed(seat, answer)
                self._say(seat)
                self._changed.notify_all()

    def _heed(self, seat: _Seat, answer: Answer) -> None:
        """Note what an engine says."""
        match answer:
            case Ready():
                seat.is_ready = True
                if self._current is not None and not self._are_resting:
                    self._have_taken(seat, self._current)
            case Rested():
                seat.is_resting = False
            case Took(policy_version=version):
                seat.is_taking, seat.is_late, seat.version = False, False, version
                self._hand_out()
            case Done(number=number, index=index, rollout=rollout):
                # One that ended just before the engine took other weights may be told of just after.
                if not seat.begun[number] <= rollout.last_version <= seat.version:
                    raise EngineLost(
                        f"it answered with the weights of publication {rollout.last_version}, not {seat.version}"
                    )
                ask = seat.asked.pop(number)
                left = tuple(i for i in ask.indices if i != index)
                assert len(left) < len(ask.indices), f"rollout {index} of group {number} came twice"
                if left:
                    seat.asked[number] = replace(ask, indices=left)
                else:
                    del seat.begun[number]
                self._done[number, index] = rollout
                self._hears[number](rollout)
                seat.losses.clear()

    def _check_silence(self, seat: _Seat) -> None:
        is_due = seat.is_taking or seat.is_resting or seat.asked or not seat.is_ready
        limit_s = self.timeout_s if seat.is_ready else max(self.timeout_s, _START_S)
        if is_due and time.monotonic() - seat.owes_since_s > limit_s:
            raise EngineLost(f"nothing was heard of it for {limit_s:g} s (trainer.hang_timeout_s)")

    def _note_loss(self, seat: _Seat, why: str) -> None:
        """Queue again what an engine hadn't finished, and give its seat up where too many were lost."""
        num_left = sum(len(ask.indices) for ask in seat.asked.values())
        self._waiting[:0] = seat.asked.values()
        seat.asked, seat.begun, seat.version = {}, {}, UNPUBLISHED
        seat.is_ready = seat.is_taking = seat.is_resting = False
        seat.losses.append(why)
        seat.is_gone = len(seat.losses) >= _MAX_LOSSES
        self._say(seat)
        what = f"{num_left} rollouts that it had begun are sampled again" if num_left else "it had nothing to do"
        then = f"it is given up after {_MAX_LOSSES} in a row" if seat.is_gone else "another takes its place"
        self._notes.append(f"engine {seat.number} is lost: {why}; {what}, {then}")
        if all(seat.is_gone for seat in self._seats):
            reasons = "\n".join(f"--- engine {s.number}: {s.losses[-1]}" for s in self._seats)
            self._failure = WorkerError(f"no engine is left to generate\n{reasons}")
        self._hand_out()
        self._changed.notify_all()


def _num_tokens(ask: Ask) -> int:
    return len(ask.indices) * (len(ask.request.token_ids) + ask.sampling.max_tokens)
