"""Engines that die, hang or answer wrongly: what becomes of the rollouts that they were asked for."""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import cast

import pytest

from megarl.controller.served_engines import ServedEngines
from megarl.errors import DataError, PublishError, WorkerError
from megarl.launchers.engine_processes import EngineLost, EngineProcesses
from megarl.rollout.served import Answer, Ask, Busy, Done, Order, Ready, Rest, Rested, Take, Took
from megarl.types import GenerationRequest, Group, Rollout, Sampling

SAMPLING = Sampling(n=3, max_tokens=4, with_greedy=True)
REQUESTS = [GenerationRequest((number,), seed=number) for number in range(7)]


def rollout(ask: Ask, index: int, version: int) -> Rollout:
    """Return what an engine answers: the prompt's token, and the index in the group."""
    return Rollout((*ask.request.token_ids, index), (-1.0, -1.0), "stop", version)


EXPECTED: list[Group] = [
    tuple(Rollout((*r.token_ids, index), (-1.0, -1.0), "stop", 0) for index in range(4)) for r in REQUESTS
]


@dataclass
class Engine:
    """An engine in this process, whose answers wait to be received. num_answers: rollouts until it is lost."""

    number: int
    num_answers: int | None = None
    error: Exception = field(default_factory=lambda: EngineLost("killed by the test"))
    stamp: int | None = None
    is_silent: bool = False
    orders: list[Order] = field(default_factory=list)
    answers: queue.SimpleQueue[Answer] = field(default_factory=queue.SimpleQueue)
    version: int = -1
    is_killed: bool = False

    def __post_init__(self) -> None:
        self.answers.put(Ready())

    def send(self, order: Order) -> None:
        assert not self.is_killed
        self.orders.append(order)
        if isinstance(order, Take):
            self.version = order.policy_version
            self.answers.put(Took(order.policy_version))
            return
        if isinstance(order, Rest):
            self.answers.put(Rested())
            return
        for ask in () if self.is_silent else order:
            for index in ask.indices:
                version = self.version if self.stamp is None else self.stamp
                self.answers.put(Done(ask.number, index, rollout(ask, index, version)))

    def receive(self, timeout_s: float) -> Answer | None:
        try:
            answer = self.answers.get(timeout=min(timeout_s, 0.01))
        except queue.Empty:
            return None
        if isinstance(answer, Done) and self.num_answers is not None:
            self.num_answers -= 1
            if self.num_answers < 0:
                raise self.error
        return answer

    def kill(self) -> None:
        self.is_killed = True

    @property
    def asked(self) -> list[Ask]:
        """Return all that it was asked, in order."""
        return [ask for order in self.orders if not isinstance(order, Take | Rest) for ask in order]


@contextmanager
def running(
    make: Callable[[int, int], Engine], num_engines: int = 1, timeout_s: float = 60.0, *, shares_devices: bool = False
) -> Iterator[tuple[ServedEngines, list[Engine], list[str]]]:
    """Yield engines that run publication 0, all that were started, and what a person was told.

    make: of the number of an engine, and of how many had its place before.
    """
    started: list[Engine] = []
    before: Counter[int] = Counter()
    told: list[str] = []

    def start(number: int) -> EngineProcesses:
        started.append(make(number, before[number]))
        before[number] += 1
        return cast(EngineProcesses, started[-1])

    made = ServedEngines(start, num_engines, timeout_s, told.append, shares_devices=shares_devices)
    with closing(made) as engines:
        engines.take(Take(0, ()))
        yield engines, started, told
    assert all(engine.is_killed for engine in started)


def until(is_so: Callable[[], object]) -> None:
    """Wait until something is so."""
    deadline_s = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def generate(engines: ServedEngines, requests: Sequence[GenerationRequest], sampling: Sampling) -> list[Group]:
    """Return the rollouts of every request, in order."""
    return engines.collect(engines.ask(requests, sampling))


@pytest.mark.parametrize("num_engines", [1, 2, 3])
def test_rollouts_come_back_in_the_order_of_their_requests_however_many_engines_share_them(num_engines: int) -> None:
    with running(lambda number, _: Engine(number), num_engines) as (engines, started, told):
        assert generate(engines, REQUESTS, SAMPLING) == EXPECTED
        assert generate(engines, REQUESTS, SAMPLING) == EXPECTED
    asked = Counter(ask.number for engine in started for ask in engine.asked)
    assert sorted(asked.values()) == [1] * (2 * len(REQUESTS))
    shares = [len(engine.asked) for engine in started]
    assert len(started) == num_engines and max(shares) - min(shares) <= 2
    assert told == []


def test_what_is_asked_together_is_begun_together() -> None:
    with running(lambda number, _: Engine(number)) as (engines, [engine], _):
        generate(engines, REQUESTS, SAMPLING)
    assert [len(order) for order in engine.orders if not isinstance(order, Take)] == [len(REQUESTS)]


def test_a_prompt_goes_to_the_engine_with_the_fewest_tokens_to_compute() -> None:
    sizes = [100, 1, 1, 1, 1, 50]
    requests = [GenerationRequest((0,) * size, seed=0) for size in sizes]
    with running(lambda number, _: Engine(number), 2) as (engines, started, _):
        generate(engines, requests, Sampling(n=1, max_tokens=1))
    first = [[len(a.request.token_ids) for a in e.asked] for e in sorted(started[:2], key=lambda e: e.number)]
    assert first == [[100], [1, 1, 1, 1, 50]]


@pytest.mark.parametrize("num_engines", [1, 2])
@pytest.mark.parametrize("num_answers", [0, 1, 5])
def test_the_rollouts_of_an_engine_that_dies_are_sampled_again_and_none_twice(
    num_engines: int, num_answers: int
) -> None:
    def make(number: int, before: int) -> Engine:
        return Engine(number, num_answers if number == 0 and before == 0 else None)

    with running(make, num_engines) as (engines, started, told):
        assert generate(engines, REQUESTS, SAMPLING) == EXPECTED
        assert generate(engines, REQUESTS, SAMPLING) == EXPECTED
        [note] = told
    begun = sum(len(ask.indices) for ask in started[0].asked)
    num_lost = begun - num_answers
    assert note == (
        f"engine 0 is lost: killed by the test; {num_lost} rollouts that it had begun are sampled again, another takes "
        "its place"
    )
    assert sum(len(a.indices) for e in started for a in e.asked) == 2 * 4 * len(REQUESTS) + num_lost


@pytest.mark.parametrize("num_answers", [None, 5])
def test_who_asked_hears_every_rollout_once_when_it_ends_with_the_place_of_its_request(num_answers: int | None) -> None:
    heard: list[tuple[int, Rollout]] = []

    def make(number: int, before: int) -> Engine:
        return Engine(number, num_answers if number == 0 and before == 0 else None)

    with running(make, 2) as (engines, _, _):
        groups = engines.collect(engines.ask(REQUESTS, SAMPLING, lambda place, rollout: heard.append((place, rollout))))
    assert Counter(place for place, _ in heard) == dict.fromkeys(range(len(REQUESTS)), 4)
    assert {id(r) for _, r in heard} == {id(r) for group in groups for r in group}
    assert all(rollout in groups[place] for place, rollout in heard)


def test_an_engine_that_dies_in_a_publication_is_replaced_by_one_with_the_new_weights() -> None:
    class DiesInSecond(Engine):
        def receive(self, timeout_s: float) -> Answer | None:
            answer = super().receive(timeout_s)
            if answer == Took(1):
                raise EngineLost("killed by the test")
            return answer

    def make(number: int, before: int) -> Engine:
        return DiesInSecond(number) if number == 1 and before == 0 else Engine(number)

    with running(make, 2) as (engines, started, told):
        engines.before_writing()
        engines.take(Take(1, ()))
        versions = {r.policy_version for group in generate(engines, REQUESTS, SAMPLING) for r in group}
        assert versions == {1}
    assert started[-1].orders[0] == Take(1, ()) and started[-1].number == 1
    assert told == ["engine 1 is lost: killed by the test; it had nothing to do, another takes its place"]


def test_engines_on_the_trainers_devices_rest_until_they_are_asked_and_others_never_do() -> None:
    for shares in (True, False):
        with running(lambda number, _: Engine(number), 2, shares_devices=shares) as (engines, started, _):
            engines.wait_until_ready()
            generate(engines, REQUESTS, SAMPLING)
            engines.rest()
            assert [engine.orders[-1] == Rest() for engine in started] == [shares] * 2
            assert generate(engines, REQUESTS, SAMPLING) == EXPECTED
        assert [sum(isinstance(order, Take) for order in engine.orders) for engine in started] == [1, 1]


def test_an_engine_that_dies_at_rest_is_replaced_by_one_that_takes_weights_when_they_are_asked_for() -> None:
    class DiesAtRest(Engine):
        def receive(self, timeout_s: float) -> Answer | None:
            if (answer := super().receive(timeout_s)) == Rested():
                raise EngineLost("killed by the test")
            return answer

    def make(number: int, before: int) -> Engine:
        return Engine(number) if before else DiesAtRest(number)

    with running(make, shares_devices=True) as (engines, started, told):
        engines.rest()
        engines.wait_until_ready()
        assert [engine.orders for engine in started] == [[Take(0, ()), Rest()], []] and len(told) == 1
        assert generate(engines, REQUESTS, SAMPLING) == EXPECTED
        assert started[-1].orders[0] == Take(0, ())


def test_an_engine_that_answers_with_other_weights_than_it_runs_is_replaced() -> None:
    with running(lambda number, before: Engine(number, stamp=7 if before == 0 else None)) as (engines, _, told):
        assert generate(engines, REQUESTS, SAMPLING) == EXPECTED
    assert "it answered with the weights of publication 7, not 0" in told[0]


def test_an_engine_that_says_nothing_is_replaced_and_one_that_says_it_is_busy_is_not() -> None:
    class Slow(Engine):
        num_busy = 30

        def receive(self, timeout_s: float) -> Answer | None:
            if self.asked and self.num_busy:
                self.num_busy -= 1
                time.sleep(0.01)
                return Busy()
            return super().receive(timeout_s)

    def make(number: int, before: int) -> Engine:
        return Slow(number) if before else Engine(number, is_silent=True)

    with running(make, timeout_s=0.1) as (engines, _, told):
        assert generate(engines, REQUESTS[:1], SAMPLING) == EXPECTED[:1]
    [note] = told
    assert "nothing was heard of it for 0.1 s (trainer.hang_timeout_s)" in note


def test_no_engine_left_ends_the_run_with_why_each_was_lost() -> None:
    with running(lambda number, _: Engine(number, 0, EngineLost(f"reason {number}")), 2) as (engines, started, told):
        with pytest.raises(WorkerError) as raised:
            generate(engines, REQUESTS, SAMPLING)
        with pytest.raises(WorkerError):
            generate(engines, REQUESTS, SAMPLING)
    assert str(raised.value) == "no engine is left to generate\n--- engine 0: reason 0\n--- engine 1: reason 1"
    assert Counter(engine.number for engine in started) == {0: 3, 1: 3}
    assert sum("it is given up after 3 in a row" in note for note in told) == 2


def test_an_engine_that_was_given_up_is_started_again_and_the_others_do_not_wait_for_it() -> None:
    lost = EngineLost("its host is gone")
    may_start = threading.Event()

    def make(number: int, before: int) -> Engine:
        if number == 1 and before < 3:
            return Engine(number, num_answers=0, error=lost)
        if number == 1:
            assert may_start.wait(60)
        return Engine(number)

    def of_late() -> list[Engine]:
        return [engine for engine in started if engine.number == 1]

    with running(make, 2) as (engines, started, told):
        while not any("it is given up after 3 in a row" in note for note in told):
            assert generate(engines, REQUESTS, SAMPLING) == EXPECTED
        engines.before_writing()
        engines.start_again((1,))
        engines.take(Take(1, ()))  # while it hasn't started
        [first, *_] = generate(engines, REQUESTS, SAMPLING)
        assert {rollout.policy_version for rollout in first} == {1}
        may_start.set()
        until(lambda: len(of_late()) == 4)
        again = of_late()[3]
        until(lambda: again.version == 1)  # it takes what the others run
        generate(engines, REQUESTS, SAMPLING)
        until(lambda: again.asked)
        engines.before_writing()
        engines.take(Take(2, ()))
        assert again.version == 2


def test_rollouts_in_between_forgive_what_was_lost_before() -> None:
    with running(lambda number, before: Engine(number, 4 if before < 6 else None)) as (engines, started, _):
        assert generate(engines, REQUESTS, SAMPLING) == EXPECTED
    assert len(started) == 7


def test_a_listener_hears_what_each_engine_does_and_with_which_weights() -> None:
    heard: list[tuple[int, str, int]] = []

    def does(number: int, what: str, policy_version: int) -> None:
        if what and heard[-1:] != [(number, what, policy_version)]:
            heard.append((number, what, policy_version))

    def start(number: int) -> EngineProcesses:
        is_first = not any(what == "generate" for _, what, _ in heard)
        return cast(EngineProcesses, Engine(number, num_answers=2 if is_first else None))

    with closing(ServedEngines(start, 1, 60.0, lambda note: None, does)) as engines:
        engines.take(Take(0, ()))
        generate(engines, REQUESTS, SAMPLING)
        engines.before_writing()
        engines.take(Take(1, ()))
        generate(engines, REQUESTS, SAMPLING)
    started = [(0, "start", -1), (0, "take weights", -1), (0, "generate", 0)]
    assert heard == [*started, *started, (0, "take weights", 0), (0, "generate", 1)]


def test_weights_that_arrived_otherwise_end_the_run_with_the_name_of_the_engine() -> None:
    with (
        running(lambda number, _: Engine(number, 0, PublishError("a checksum differs"))) as (engines, started, _),
        pytest.raises(PublishError, match=r"^engine 0: a checksum differs$"),
    ):
        generate(engines, REQUESTS, SAMPLING)
    assert len(started) == 1


@pytest.mark.parametrize("error", [DataError("too long"), ZeroDivisionError("a bug")])
def test_an_error_that_another_start_would_not_heal_ends_the_run_as_it_is(error: Exception) -> None:
    with (
        running(lambda number, _: Engine(number, 0, error)) as (engines, started, _),
        pytest.raises(type(error), match=str(error)),
    ):
        generate(engines, REQUESTS, SAMPLING)
    assert len(started) == 1


@dataclass
class Late(Engine):
    """An engine that tells of its first rollouts once it has taken other weights. stamp: of these rollouts."""

    held: list[Ask] = field(default_factory=list)

    def send(self, order: Order) -> None:
        if not isinstance(order, Take | Rest):
            self.held += order
            return
        super().send(order)
        held, self.held = self.held, []
        super().send(tuple(held))


@pytest.mark.parametrize(("stamp", "is_lost"), [(0, False), (1, False), (-1, True), (2, True)])
def test_rollouts_that_ended_before_a_switch_count_though_they_are_told_of_after_it(stamp: int, is_lost: bool) -> None:
    def make(number: int, before: int) -> Engine:
        return Engine(number) if before else Late(number, stamp=stamp)

    with running(make) as (engines, _, told):
        numbers = engines.ask(REQUESTS, SAMPLING)
        engines.take(Take(1, ()))
        versions = {r.policy_version for group in engines.collect(numbers) for r in group}
    assert versions == ({1} if is_lost else {stamp})
    assert len(told) == is_lost
    assert not is_lost or f"it answered with the weights of publication {stamp}, not 1" in told[0]
