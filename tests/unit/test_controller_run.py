from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megarl.algorithm.kl_control import KLControlSettings, kl_controllers
from megarl.algorithm.loss_specs import DemonstrationLossSpec, ValueLossSpec
from megarl.algorithm.recipe import ActorLogprobs, TrainBatch, Update
from megarl.batching.pack import sequences_to_batch
from megarl.checkpoint.folder import CheckpointFolder
from megarl.checkpoint.rank_save import SavedPart
from megarl.checkpoint.trainer_state import TrainerState, read_trainer_state
from megarl.controller.demonstrations import Demonstrations
from megarl.controller.loop import train
from megarl.controller.non_finite import NonFinite
from megarl.controller.report import Evaluation
from megarl.controller.role_on_ranks import RoleOnRanks
from megarl.controller.run import Run, Schedule
from megarl.controller.saving import Saver, SaveSettings
from megarl.monitor.console import RolloutRow
from megarl.monitor.preemption import Limit, Preempted, Preemption
from megarl.monitor.sinks import Tracker
from megarl.monitor.timing import Stopwatch
from megarl.parallel.layout import Layout
from megarl.ranks.work import SaveWork
from megarl.train.held_state import UpdateCounts
from megarl.train.work import ScoreWork, Updated, UpdateWork
from megarl.types import Metrics, ValueBatch
from tests.unit.small_roles import role_on
from tests.unit.stand_ins import PlainRanks

CHATS = Demonstrations(sequences_to_batch([[1, 2, 3]], [[False, True, True]]))
ROW = RolloutRow("what?", "that", "that", 1.0)


@dataclass
class Sink:
    """Keeps what is logged, and notes it among the events."""

    events: list[str]
    logged: dict[int, dict[str, float]] = field(default_factory=dict)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        assert step not in self.logged
        self.events.append(f"log {step}")
        self.logged[step] = dict(metrics)

    def close(self) -> None:
        """Keep all."""


@dataclass
class Chats:
    """A sampler of the same chat in every step. rows: what there is to read of it."""

    events: list[str]
    rows: tuple[RolloutRow, ...] = ()

    def take(self, step: int) -> Demonstrations:
        self.events.append(f"take {step}")
        return CHATS

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.events.append("pause")
        yield
        self.events.append("go on")

    def sampled_rows(self) -> tuple[RolloutRow, ...]:
        return self.rows

    def every_row(self) -> tuple[RolloutRow, ...]:
        return (ROW, ROW, ROW)


@dataclass
class Plain:
    """A recipe that trains on what it is given, and on its values where there are any."""

    events: list[str]
    critic_warmup_steps: int = 0

    def old_logprobs(self, samples: Demonstrations, actor: ActorLogprobs, step: int) -> None:
        """Need none."""

    def train_batch(
        self, samples: Demonstrations, old_BS: Tensor | None, ref_BS: Tensor | None, values_BS: Tensor | None, step: int
    ) -> TrainBatch:
        rows = vars(samples.batch)
        values = None if values_BS is None else ValueBatch(**rows, values_BS=values_BS, returns_BS=values_BS)
        return TrainBatch(samples.batch, values, {})

    def metrics(self, samples: Demonstrations, batch: TrainBatch, update: Update | None) -> Metrics:
        return {"recipe/updated": float(update is not None)}


class Opened:
    """A run on one rank that notes in ``events`` what happens in which order."""

    def __init__(self, folder: Path, schedule: Schedule, *, with_critic: bool = False, warmup: int = 0) -> None:
        self.events: list[str] = []
        self.sink = Sink(self.events)
        self.ranks = PlainRanks(1, self.answer)
        self.sampler = Chats(self.events)
        self.checkpoints, stopwatch = CheckpointFolder(folder / "checkpoints"), Stopwatch()
        self.preemption = Preemption(Limit(3600.0, "this test"), self.events.append)
        actor, critic = (role_on(Layout(1), name=name) for name in ("actor", "critic"))
        values = RoleOnRanks(critic, self.ranks, 0, stopwatch, ValueLossSpec(0.2, "token-mean"))
        self.run = Run(
            sampler=self.sampler,
            recipe=Plain(self.events, warmup),
            actor=RoleOnRanks(actor, self.ranks, 0, stopwatch, DemonstrationLossSpec()),
            ref=None,
            critic=values if with_critic else None,
            publication=None,
            evaluate=self.evaluate,
            state=lambda step: TrainerState(step, step, kl_controllers.get("fixed")(KLControlSettings(0.1))),
            saver=(saver := Saver(self.ranks, self.checkpoints, SaveSettings(), self.events.append)),
            non_finite=NonFinite(
                "skip", 2, self.ranks, self.checkpoints, self.restore, self.events.append, saver.finish
            ),
            schedule=schedule,
            tracker=Tracker([self.sink]),
            run_dir=folder,
            stopwatch=stopwatch,
            preemption=self.preemption,
        )

    def answer(self, rank: int, verb: str, argument: object) -> object:
        """Note a call, and answer what a rank would."""
        match argument:
            case SaveWork(folder):
                assert verb == "save"
                self.events.append(f"save {Path(folder).name.removeprefix('.').removesuffix('.partial')}")
                return None
            case bool():
                assert verb == "saved"
                return SavedPart(updates={"actor": UpdateCounts(1, 1)})
            case UpdateWork(role=role, steps=steps):
                self.events.append(f"update {role}")
                return Updated(tuple({"loss": 1.0} for _ in steps))
            case ScoreWork(role=role, sequences=sequences):
                self.events.append(f"score {role}")
                return torch.zeros(sequences.tokens_BS.shape)
        raise AssertionError(verb)

    def evaluate(self, step: int) -> Evaluation:
        """Note an evaluation, whose value is its step."""
        self.events.append(f"evaluate {step}")
        return Evaluation(step, float(step), "reward", {"val/reward_mean": float(step)})

    def restore(self, state: TrainerState) -> None:
        """Note that the controller goes back."""
        self.events.append(f"back to {state.step}")

    def go(self) -> None:
        """Take all steps, each of which tells its number."""
        for step in self.run.steps():
            self.events.append(f"step {step}")
            self.run.tell({"told": float(step)})

    def steps_with(self, metric: str) -> list[int]:
        """Return the steps that were logged with a metric."""
        return [step for step, metrics in self.sink.logged.items() if metric in metrics]


def test_a_step_is_validated_and_logged_before_it_is_saved(tmp_path: Path) -> None:
    opened = Opened(tmp_path, Schedule(3, test_freq=2, save_freq=2, val_before_train=True))
    opened.go()
    assert opened.events == [
        *("evaluate 0", "log 0"),
        *("step 1", "log 1"),
        *("step 2", "evaluate 2", "log 2", "save step_2"),
        *("step 3", "evaluate 3", "log 3", "save step_3"),
    ]


def test_the_time_before_training_and_the_last_step_are_logged_with_what_validation_found(tmp_path: Path) -> None:
    opened = Opened(tmp_path, Schedule(5, test_freq=2, val_before_train=True))
    opened.go()
    assert opened.steps_with("val/reward_mean") == [0, 2, 4, 5]
    assert [opened.sink.logged[step]["val/reward_mean"] for step in (0, 2, 4, 5)] == [0.0, 2.0, 4.0, 5.0]
    assert [evaluation.step for evaluation in opened.run.evaluations] == [0, 2, 4, 5]


@pytest.mark.parametrize(("test_freq", "validated"), [(None, [3]), (1, [1, 2, 3]), (3, [3]), (9, [3])])
def test_the_last_step_is_always_validated_once(tmp_path: Path, test_freq: int | None, validated: list[int]) -> None:
    opened = Opened(tmp_path, Schedule(3, test_freq=test_freq))
    opened.go()
    assert opened.steps_with("val/reward_mean") == validated
    assert list(opened.sink.logged) == [1, 2, 3]  # and nothing of the time before training unless that is asked for


@pytest.mark.parametrize(("save_freq", "saved"), [(None, [4]), (2, [2, 4]), (1, [1, 2, 3, 4]), (4, [4]), (3, [3, 4])])
def test_the_last_step_is_saved_once_and_linked_as_final(
    tmp_path: Path, save_freq: int | None, saved: list[int]
) -> None:
    opened = Opened(tmp_path, Schedule(4, save_freq=save_freq))
    opened.go()
    assert opened.checkpoints.steps() == saved
    assert (tmp_path / "checkpoints" / "final").resolve() == opened.checkpoints.of(4)
    states = [read_trainer_state(opened.checkpoints.of(step)) for step in saved]
    assert [state.step for state in states] == saved
    assert [state.metrics["told"] for state in states] == saved
    assert {state.updates["actor"] for state in states} == {UpdateCounts(1, 1)}


def test_a_run_that_goes_on_takes_the_steps_that_are_left_and_does_not_validate_before(tmp_path: Path) -> None:
    opened = Opened(tmp_path, Schedule(4, first=3, val_before_train=True))
    opened.go()
    assert opened.events == ["step 3", "log 3", "step 4", "evaluate 4", "log 4", "save step_4"]


def test_a_step_at_whose_end_a_save_is_due_by_the_clock_is_saved(tmp_path: Path) -> None:
    opened, now_s = Opened(tmp_path, Schedule(5, save_freq=4)), [0.0]
    opened.run.saver = Saver(
        opened.ranks, opened.checkpoints, SaveSettings(every_min=1.0), opened.events.append, lambda: now_s[0]
    )
    for _ in opened.run.steps():
        now_s[0] += 31.0
    assert opened.checkpoints.steps() == [2, 4, 5]


@pytest.mark.parametrize("in_background", [False, True])
def test_a_run_that_is_asked_to_end_saves_that_step_without_validating_and_takes_no_other(
    tmp_path: Path, in_background: bool
) -> None:
    opened = Opened(tmp_path, Schedule(4, test_freq=1))
    opened.run.saver.settings = SaveSettings(in_background=in_background)
    for step in opened.run.steps():
        opened.events.append(f"step {step}")
        if step == 2:
            opened.preemption.ask("a signal")
    told = "a signal: the run saves at the end of this step, and ends; a second signal ends it at once"
    assert opened.events == ["step 1", "evaluate 1", "log 1", "step 2", told, "log 2", "save step_2"]
    assert opened.checkpoints.steps() == [2]
    assert not (tmp_path / "checkpoints" / "final").exists()
    with pytest.raises(Preempted):
        opened.run.raise_if_preempted()


def test_a_run_that_is_asked_to_end_in_its_last_step_has_come_to_its_end(tmp_path: Path) -> None:
    opened = Opened(tmp_path, Schedule(1))
    for _ in opened.run.steps():
        opened.preemption.ask("a signal")
    opened.preemption.saved()
    opened.run.raise_if_preempted()
    assert (tmp_path / "checkpoints" / "final").resolve() == opened.checkpoints.of(1)


def test_the_value_before_training_is_saved_with_every_checkpoint(tmp_path: Path) -> None:
    opened = Opened(tmp_path, Schedule(2, save_freq=1, val_before_train=True))
    opened.go()
    assert [read_trainer_state(opened.checkpoints.of(step)).before for step in (1, 2)] == [0.0, 0.0]


def test_every_step_is_logged_with_what_it_was_told_and_not_with_what_another_was(tmp_path: Path) -> None:
    opened = Opened(tmp_path, Schedule(3, test_freq=2, save_freq=2, val_before_train=True))
    opened.go()
    assert {step: metrics.get("told") for step, metrics in opened.sink.logged.items()} == {0: None, 1: 1, 2: 2, 3: 3}
    assert opened.steps_with("time_s/step") == [1, 2, 3]
    assert opened.steps_with("time_s/validate") == [2, 3]
    assert opened.steps_with("time_s/save") == [3]  # of the step before


def test_a_step_that_fails_is_neither_logged_nor_saved(tmp_path: Path) -> None:
    opened = Opened(tmp_path, Schedule(3, test_freq=1, save_freq=1))

    def lose_step_2() -> None:
        for step in opened.run.steps():
            if step == 2:
                raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        lose_step_2()
    assert opened.events == ["evaluate 1", "log 1", "save step_1"]


def test_sampled_rollouts_are_written_in_every_step_that_has_some(tmp_path: Path) -> None:
    opened = Opened(tmp_path, Schedule(3))
    for step in opened.run.steps():
        opened.sampler.rows = (ROW, ROW) if step != 2 else ()
    written = {path.name: path.read_text().splitlines() for path in (tmp_path / "rollouts").iterdir()}
    assert {name: len(lines) for name, lines in written.items()} == {"step_1.jsonl": 2, "step_3.jsonl": 2}
    assert json.loads(written["step_3.jsonl"][1]) == {"step": 3, **vars(ROW)}


def test_a_run_without_rows_to_read_has_no_folder_of_them(tmp_path: Path) -> None:
    Opened(tmp_path, Schedule(2)).go()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_the_loop_updates_the_critic_before_the_actor_which_waits_while_the_critic_warms_up(tmp_path: Path) -> None:
    opened = Opened(tmp_path, Schedule(2), with_critic=True, warmup=1)
    train(opened.run)
    assert opened.events == [
        *("take 1", "score critic", "update critic", "log 1"),
        *("take 2", "score critic", "update critic", "update actor", "pause", "go on", "evaluate 2", "log 2"),
        "save step_2",
    ]
    first, last = opened.sink.logged[1], opened.sink.logged[2]
    assert (first["recipe/updated"], last["recipe/updated"]) == (0.0, 1.0)
    assert "actor/loss" not in first and last["actor/loss"] == last["critic/loss"] == 1.0
    parts = ("sample", "log_probs", "advantages", "update_critic", "update_actor", "publish")
    assert {f"time_s/{name}" for name in parts} <= set(last)


def test_the_loop_without_a_critic_takes_samples_and_updates_the_actor(tmp_path: Path) -> None:
    opened = Opened(tmp_path, Schedule(1))
    train(opened.run)
    assert opened.events == ["take 1", "update actor", "pause", "go on", "evaluate 1", "log 1", "save step_1"]
