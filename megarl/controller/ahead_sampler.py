"""Rollouts that were sampled ahead: while a step is trained, engines in their own processes sample those of the next.

They come from the weights before the step's update, one publication older than those that train on them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from megarl.algorithm.samples import Samples
from megarl.checkpoint.rollouts_ahead import RolloutsAhead
from megarl.controller.engine_servers import Asked, EngineServers
from megarl.controller.sampler import RolloutSampler
from megarl.monitor.console import RolloutRow


@dataclass
class AheadSampler:
    """Takes the rollouts of a step when they are asked for, and has those of the next sampled.

    last_step: of the run. ahead: rollouts that a checkpoint had.
    """

    sampler: RolloutSampler
    engine: EngineServers
    last_step: int
    ahead: RolloutsAhead | None = None
    _asked: Asked | None = None
    _asked_for: int = 0

    def take(self, step: int) -> Samples:
        """Return the rollouts of a step, counted from 1, with their rewards."""
        if self.ahead is not None and not self._is_wanted(self.ahead, step):
            self.ahead = None  # of a checkpoint, from which the run goes on with other data or another sampling
        self._begin(step)
        with self.sampler.stopwatch.timed("generate"):
            ahead = self._finished()
        assert ahead is not None and ahead.step == step
        self.ahead = None
        if step < self.last_step:
            self._begin(step + 1)
        return replace(self.sampler.samples(step, ahead.groups), current_version=self.engine.engines.policy_version)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Wait for what is sampled ahead: the rollouts of a step are all of one publication."""
        with self.sampler.stopwatch.timed("generate"):
            self._finished()
        yield

    def finished_ahead(self) -> RolloutsAhead | None:
        """Return the rollouts of the next step, once all are sampled; None where none are."""
        return self._finished()

    def sampled_rows(self) -> tuple[RolloutRow, ...]:
        """Return the first rollout of some of the prompts that were taken last."""
        return self.sampler.sampled_rows()

    def every_row(self) -> tuple[RolloutRow, ...]:
        """Return all rollouts that were taken last."""
        return self.sampler.every_row()

    def _begin(self, step: int) -> None:
        """Have the rollouts of a step sampled, unless they are or were."""
        if self._asked is None and self.ahead is None:
            ended = self.sampler.scoring_of(self.sampler.prompts_of(step))
            self._asked = self.engine.ask(tuple(self.sampler.requests(step)), self.sampler.sampling, ended)
            self._asked_for = step

    def _finished(self) -> RolloutsAhead | None:
        """Wait for what is sampled ahead, and keep it."""
        if self._asked is not None:
            asked, self._asked = self._asked, None
            groups = tuple(asked.result())
            self.ahead = RolloutsAhead(self._asked_for, tuple(asked.requests), asked.sampling, groups)
        return self.ahead

    def _is_wanted(self, ahead: RolloutsAhead, step: int) -> bool:
        wanted = step, tuple(self.sampler.requests(step)), self.sampler.sampling
        return (ahead.step, ahead.requests, ahead.sampling) == wanted
