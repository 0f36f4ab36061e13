"""A run: everything the loop needs, and what happens around its steps."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from megarl.algorithm.recipe import ActorLogprobs, TrainBatch, Update
from megarl.checkpoint.trainer_state import TrainerState
from megarl.controller.non_finite import NonFinite, skipped_roles
from megarl.controller.publication import Publication
from megarl.controller.report import Evaluation
from megarl.controller.role_on_ranks import RoleOnRanks
from megarl.controller.saving import Saver
from megarl.monitor.console import RolloutRow, rollouts_table
from megarl.monitor.disk import refusals_named, write_file
from megarl.monitor.preemption import Preempted, Preemption
from megarl.monitor.sinks import Tracker
from megarl.monitor.timing import Stopwatch
from megarl.types import Metrics, Sequences


class HasSequences(Protocol):
    """What a step learns from, as sequences."""

    @property
    def batch(self) -> Sequences:
        """The sequences."""
        ...


S = TypeVar("S", bound=HasSequences)
S_co = TypeVar("S_co", bound=HasSequences, covariant=True)
S_contra = TypeVar("S_contra", bound=HasSequences, contravariant=True)


class Sampler(Protocol[S_co]):
    """Where the samples of a step come from. Synchronous and asynchronous training differ in it alone."""

    def take(self, step: int) -> S_co:
        """Return the samples of a step, counted from 1."""
        ...

    def paused(self) -> AbstractContextManager[None]:
        """Have no sampling go on for the duration."""
        ...

    def sampled_rows(self) -> tuple[RolloutRow, ...]:
        """Return some of the samples that were taken last, for people to read."""
        ...

    def every_row(self) -> tuple[RolloutRow, ...]:
        """Return all samples that were taken last."""
        ...


class RecipeOf(Protocol[S_contra]):
    """From samples to what is trained on; ``megarl.algorithm.recipe`` has that of rollouts."""

    @property
    def critic_warmup_steps(self) -> int:
        """Steps at the start that train the critic alone."""
        ...

    def old_logprobs(self, samples: S_contra, actor: ActorLogprobs, step: int) -> Tensor | None:
        """Return log-probs [B, S] by the actor before its update, None where nothing needs them."""
        ...

    def train_batch(
        self, samples: S_contra, old_BS: Tensor | None, ref_BS: Tensor | None, values_BS: Tensor | None, step: int
    ) -> TrainBatch:
        """Return the TrainBatch of a step."""
        ...

    def metrics(self, samples: S_contra, batch: TrainBatch, update: Update | None) -> Metrics:
        """Return the metrics of a step. update: the actor's, None where there was none."""
        ...


@dataclass(frozen=True)
class Schedule:
    """What happens when. Frequencies are in steps; None: at the end alone. first: the step to go on with."""

    num_steps: int
    first: int = 1
    test_freq: int | None = None
    save_freq: int | None = None
    show_freq: int = 1
    val_before_train: bool = False

    def is_due(self, every: int | None, step: int) -> bool:
        """Whether something done every so many steps is due."""
        return every is not None and step % every == 0


@dataclass
class Run(Generic[S]):
    """A run after start-up.

    publication: None where there is no engine. evaluate: of the step it is given. state: the controller's after a step.
    memory: metrics of what a step held on the ranks' devices.
    """

    sampler: Sampler[S]
    recipe: RecipeOf[S]
    actor: RoleOnRanks
    ref: RoleOnRanks | None
    critic: RoleOnRanks | None
    publication: Publication | None
    evaluate: Callable[[int], Evaluation]
    state: Callable[[int], TrainerState]
    saver: Saver
    non_finite: NonFinite
    schedule: Schedule
    tracker: Tracker
    run_dir: Path
    stopwatch: Stopwatch
    preemption: Preemption
    memory: Callable[[], Metrics] = dict
    evaluations: list[Evaluation] = field(default_factory=list)
    _metrics: Metrics = field(default_factory=dict)
    _step: int = 0
    _is_preempted: bool = False

    def publish(self, actor: RoleOnRanks) -> None:
        """Give the engine, if there is one, the actor's weights."""
        if self.publication is not None:
            self.publication.publish(actor)

    def tell(self, metrics: Metrics) -> None:
        """Add to the metrics of this step."""
        self._metrics |= metrics

    def steps(self) -> Iterator[int]:
        """Yield every step, counted from 1; validate, log and save after them.

        The time of a save is told with the next step. Where the machine is wanted back, the step is the last one: it
        is saved at once, a validation is left out.
        """
        schedule, timed = self.schedule, self.stopwatch.timed
        if schedule.val_before_train and schedule.first == 1:
            with timed("validate"):
                self._evaluate(0)
            self.tracker.log(0, self._drained())
        self.stopwatch.drain()
        for step in range(schedule.first, schedule.num_steps + 1):
            self._step = step
            with timed("step"):
                yield step
            if skipped_roles(self._metrics):
                self._write_rows(f"non_finite_step_{step}", step, self.sampler.every_row())
            if self.non_finite.after(step, self._metrics):
                with self.sampler.paused():
                    self.publish(self.actor)
            is_last = step == schedule.num_steps
            self._is_preempted = self.preemption.is_asked and not is_last
            if is_last or (schedule.is_due(schedule.test_freq, step) and not self._is_preempted):
                with timed("validate"):
                    self._evaluate(step)
            metrics = self._log(step)  # before the save: who goes on from it does not take the step again
            is_save_due = schedule.is_due(schedule.save_freq, step) or self.saver.is_due()
            if self._is_preempted or (is_save_due and not is_last):
                with timed("save"):
                    self._save(step, metrics)
            self.saver.poll()
            if self._is_preempted:
                self.saver.finish()
                self.preemption.saved()
                return
        with timed("save"):
            self._save(schedule.num_steps, metrics, is_last=True)

    def place(self) -> str:
        """Return the step and the phase that the run is in, in words."""
        step = f"step {self._step}" if self._step else "before the first step"
        return ", ".join(filter(None, (step, self.stopwatch.innermost)))

    def raise_if_preempted(self) -> None:
        """Raise Preempted where the steps ended before the last one."""
        if self._is_preempted:
            raise Preempted

    def _save(self, step: int, metrics: Metrics, *, is_last: bool = False) -> None:
        """Save the run after ``step`` with the step's metrics."""
        before = next((evaluation.value for evaluation in self.evaluations if evaluation.step == 0), None)
        state = replace(
            self.state(step), metrics=dict(metrics), before=before, skipped_in_a_row=self.non_finite.in_a_row
        )
        self.saver.save(state, is_last=is_last)

    def _evaluate(self, step: int) -> None:
        evaluation = self.evaluate(step)
        self.evaluations.append(evaluation)
        self._write_rows(f"val_step_{step}", step, evaluation.rows)
        self.tell(evaluation.metrics)

    def _log(self, step: int) -> Metrics:
        """Give a step's metrics to the sinks, and its sampled rollouts to rollouts/; return the metrics."""
        times = {f"time_s/{name}": seconds for name, seconds in self.stopwatch.drain().items()}
        metrics = self._drained()
        self.tracker.log(step, {**metrics, **times, **self.memory()})
        rows, freq = self.sampler.sampled_rows(), self.schedule.show_freq
        self._write_rows(f"step_{step}", step, rows)
        if rows and step % freq == 1 % freq:
            self.tracker.show(rollouts_table(rows))
        return metrics

    def _write_rows(self, name: str, step: int, rows: Sequence[RolloutRow]) -> None:
        """Write sampled rollouts to rollouts/``name``.jsonl, where there are any."""
        if not rows:
            return
        path = self.run_dir / "rollouts" / f"{name}.jsonl"
        with refusals_named(path):
            path.parent.mkdir(exist_ok=True)
        write_file(path, "".join(json.dumps({"step": step, **vars(row)}) + "\n" for row in rows))

    def _drained(self) -> Metrics:
        metrics, self._metrics = self._metrics, {}
        return metrics
