"""Rollouts that are sampled all the time: a step takes groups that are complete, and publishing waits for none.

Engines in processes of their own always have what is asked for a few steps ahead. They change weights between two
tokens, and go on. Places are those of the prompts among all that the run trains on, in order, counted from 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TypeVar

from megarl.algorithm.samples import Samples
from megarl.checkpoint.rollouts_ahead import RolloutsAhead
from megarl.controller.engine_servers import Asked, EngineServers
from megarl.controller.sampler import RolloutSampler
from megarl.monitor.console import RolloutRow
from megarl.types import Group

T = TypeVar("T")


@dataclass
class StreamSampler:
    """Takes groups that are complete, the oldest first where they would become too old, and has more sampled.

    last_step: of the run. max_staleness: publications by which the weights that train on a rollout may be newer than
    those of its first token. ahead: what a checkpoint had.
    """

    sampler: RolloutSampler
    engine: EngineServers
    last_step: int
    max_staleness: int
    ahead: RolloutsAhead | None = None
    _last_asked: int = 0
    _under_way: dict[int, Asked] = field(default_factory=dict)
    _begun: dict[int, int] = field(default_factory=dict)
    _ready: dict[int, Group] = field(default_factory=dict)

    def take(self, step: int) -> Samples:
        """Return as many groups as a step has prompts, with their rewards."""
        self._go_on(step)
        for asked in range(self._last_asked + 1, min(step + self.max_staleness, self.last_step) + 1):
            first = (asked - 1) * self._size
            self._ask(range(first, first + self._size))
            self._last_asked = asked
        with self.sampler.stopwatch.timed("generate"):
            places = self._chosen()
        groups = [self._ready.pop(place) for place in places]
        for place in places:
            del self._begun[place]
        prompts = self._at(places, self.sampler.prompts_of)
        return replace(self.sampler.samples(step, groups, prompts), current_version=self._current)

    def paused(self) -> AbstractContextManager[None]:
        """Do nothing: engines change weights between two tokens of what is under way."""
        return nullcontext()

    def state(self) -> RolloutsAhead | None:
        """Return the RolloutsAhead of what is asked for and not trained on, complete or not; None where nothing is."""
        self._collect(0)
        places = tuple(sorted(self._begun))
        if not places:
            return None
        requests = tuple(self._at(places, self.sampler.requests))
        groups = tuple(self._ready.get(place, ()) for place in places)
        return RolloutsAhead(self._last_asked, requests, self.sampler.sampling, groups, places)

    def sampled_rows(self) -> tuple[RolloutRow, ...]:
        """Return the first rollout of some of the prompts that were taken last."""
        return self.sampler.sampled_rows()

    def every_row(self) -> tuple[RolloutRow, ...]:
        """Return all rollouts that were taken last."""
        return self.sampler.every_row()

    @property
    def _size(self) -> int:
        return len(self.sampler.prompts_of(1))

    @property
    def _current(self) -> int:
        return self.engine.engines.policy_version

    def _go_on(self, step: int) -> None:
        """Take up what a checkpoint had ahead; nothing of it where the run goes on with other data or sampling."""
        ahead, self.ahead = self.ahead, None
        if not self._last_asked:
            self._last_asked = step - 1
        if ahead is None or ahead.sampling != self.sampler.sampling or not ahead.places:
            return
        if tuple(self._at(ahead.places, self.sampler.requests)) != ahead.requests:
            return
        self._last_asked = ahead.step
        for place, group in zip(ahead.places, ahead.groups, strict=True):
            if group:
                self._ready[place], self._begun[place] = group, _oldest(group)
        self._ask([place for place, group in zip(ahead.places, ahead.groups, strict=True) if not group])

    def _at(self, places: Sequence[int], of_step: Callable[[int], list[T]]) -> list[T]:
        """Return the item of each place, as a list. of_step: gives the items of a step; it is asked once a step."""
        steps = {place // self._size + 1 for place in places}
        found = {step: of_step(step) for step in steps}
        return [found[place // self._size + 1][place % self._size] for place in places]

    def _ask(self, places: Sequence[int]) -> None:
        """Have the groups of places sampled, each asked for by itself."""
        requests, prompts = (self._at(places, of_step) for of_step in (self.sampler.requests, self.sampler.prompts_of))
        for place, request, prompt in zip(places, requests, prompts, strict=True):
            ended = self.sampler.scoring_of([prompt])
            self._under_way[place] = self.engine.ask((request,), self.sampler.sampling, ended)
            self._begun[place] = self._current

    def _chosen(self) -> list[int]:
        """Wait for a step's groups, and return their places, in order."""
        self._collect(0)
        while True:
            old = [p for p, group in self._ready.items() if self._age(_oldest(group)) > self.max_staleness]
            for place in old:
                del self._ready[place]  # weights were published more often than steps were taken
            self._ask(old)
            chosen = self._selection()
            if chosen is not None:
                return sorted(chosen)
            self._collect(1)

    def _selection(self) -> list[int] | None:
        """Return places of complete groups for a step, the oldest first; None where some must be waited for.

        Of those that were begun with the same weights or older ones, no more may be left than the steps can take in
        which they are still new enough.
        """
        ready = sorted(self._ready, key=lambda place: (self._begun[place], place))
        chosen: list[int] = []
        for version in sorted(set(self._begun.values())):
            num_open = sum(begun <= version for begun in self._begun.values())
            num_needed = num_open - self._size * max(0, self.max_staleness - self._age(version))
            others = [place for place in ready if self._begun[place] <= version and place not in chosen]
            chosen += others[: max(0, num_needed - len(chosen))]
            if len(chosen) < min(num_needed, self._size):
                return None
        chosen += [place for place in ready if place not in chosen]
        return chosen[: self._size] if len(chosen) >= self._size else None

    def _age(self, version: int) -> int:
        return self._current - version

    def _collect(self, least: int) -> None:
        """Wait for ``least`` groups, and keep all that are complete."""
        places = sorted(self._under_way)
        found = self.engine.collect_complete([self._under_way[place] for place in places], least)
        for index, group in found.items():
            del self._under_way[places[index]]
            self._ready[places[index]] = group


def _oldest(group: Group) -> int:
    return min(rollout.policy_version for rollout in group)
