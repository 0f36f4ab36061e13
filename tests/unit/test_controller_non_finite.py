"""What becomes of a run whose gradients aren't finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megarl.checkpoint.folder import CheckpointFolder
from megarl.checkpoint.manifest import hashed
from megarl.checkpoint.trainer_state import FILE_NAME, TrainerState, write_trainer_state
from megarl.controller.non_finite import NonFinite
from megarl.errors import WorkerError
from megarl.ranks.spec import Resumed
from megarl.train.held_state import UpdateCounts
from tests.unit.stand_ins import PlainRanks

GOOD, BAD = {"actor/num_skipped": 0.0, "actor/loss": 1.0}, {"actor/num_skipped": 2.0, "critic/num_skipped": 1.0}
COUNTS = {"actor": UpdateCounts(3, 3)}


class Watched:
    """A NonFinite, and all that it did."""

    def __init__(self, folder: Path, policy: str, most: int = 2) -> None:
        self.ranks, self.told, self.restored = PlainRanks(2), list[str](), list[int]()
        self.checkpoints = CheckpointFolder(folder / "checkpoints")
        self.under_way: int | None = None
        self.non_finite = NonFinite(
            policy, most, self.ranks, self.checkpoints, self._restore, self.told.append, self._end_save
        )

    def _restore(self, state: TrainerState) -> None:
        self.restored.append(state.step)

    def _end_save(self) -> None:
        if self.under_way is not None:
            self.save(self.under_way)

    def save(self, step: int) -> None:
        """Make a checkpoint."""
        partial = self.checkpoints.begin(step)
        write_trainer_state(partial, TrainerState(step, step, None, COUNTS))
        self.checkpoints.commit(partial, step, [hashed(partial, FILE_NAME)], is_last=False)

    def calls(self) -> list[tuple[str, list[Any]]]:
        """Return what the ranks were told."""
        return self.ranks.calls


def test_steps_with_finite_gradients_are_no_matter(tmp_path: Path) -> None:
    watched = Watched(tmp_path, "stop", most=1)
    assert not any(watched.non_finite.after(step, GOOD) for step in range(1, 9))
    assert watched.told == [] and watched.calls() == []


def test_a_run_that_stops_stops_at_the_first_and_names_the_roles(tmp_path: Path) -> None:
    told = "step 4: the gradient norm of the actor and the critic isn't finite, or is above optim.skip_grad_norm"
    with pytest.raises(WorkerError, match=told):
        Watched(tmp_path, "stop").non_finite.after(4, BAD)


def test_a_run_that_skips_goes_on_until_there_are_too_many_in_a_row(tmp_path: Path) -> None:
    watched = Watched(tmp_path, "skip", most=3)
    for step, metrics in enumerate((BAD, BAD, GOOD, BAD, BAD), start=1):
        assert not watched.non_finite.after(step, metrics)
    assert [line.partition(":")[0] for line in watched.told] == ["step 1", "step 2", "step 4", "step 5"]
    assert "rollouts/non_finite_step_5.jsonl" in watched.told[-1]
    with pytest.raises(WorkerError, match="as in the 2 steps before"):
        watched.non_finite.after(6, BAD)


def test_a_run_that_rolls_back_takes_up_its_last_checkpoint_and_counts_anew(tmp_path: Path) -> None:
    watched = Watched(tmp_path, "rollback")
    for step in (2, 5):
        watched.save(step)
    assert [watched.non_finite.after(step, BAD) for step in (6, 7, 8, 9)] == [False, True, False, True]
    resumed = Resumed(str(tmp_path / "checkpoints" / "step_5"), COUNTS)
    assert watched.calls() == [("load", [resumed, resumed])] * 2
    assert watched.restored == [5, 5]
    assert "going on from the weights and the optimizer of step 5" in watched.told[1]


def test_a_save_that_is_under_way_is_the_last_checkpoint_and_not_lost_where_the_run_ends(tmp_path: Path) -> None:
    back, stopped = Watched(tmp_path / "back", "rollback", most=1), Watched(tmp_path / "stopped", "stop")
    back.save(2)
    back.under_way = stopped.under_way = 5
    assert back.non_finite.after(6, BAD) and back.restored == [5]
    with pytest.raises(WorkerError):
        stopped.non_finite.after(6, BAD)
    assert stopped.checkpoints.steps() == [5]


def test_a_run_that_goes_on_counts_the_steps_in_a_row_that_the_checkpoint_had(tmp_path: Path) -> None:
    watched = Watched(tmp_path, "skip", most=3)
    watched.non_finite.in_a_row = 2
    with pytest.raises(WorkerError, match="as in the 2 steps before"):
        watched.non_finite.after(6, BAD)


def test_a_run_without_a_checkpoint_can_only_stop(tmp_path: Path) -> None:
    watched = Watched(tmp_path, "rollback", most=1)
    with pytest.raises(WorkerError, match="the optimizer step was not taken"):
        watched.non_finite.after(1, BAD)
