"""Saves as the controller sees them: what the ranks are told, when a checkpoint is there, and what a failure does."""

from __future__ import annotations

from pathlib import Path

import pytest

from megarl.checkpoint.folder import CheckpointFolder, Kept
from megarl.checkpoint.manifest import hashed, read_manifest, verify
from megarl.checkpoint.rank_save import SavedPart
from megarl.checkpoint.trainer_state import TrainerState, read_trainer_state
from megarl.controller.saving import Saver, SaveSettings
from megarl.errors import ResourceError
from megarl.ranks.work import SaveWork
from megarl.train.held_state import UpdateCounts
from tests.unit.stand_ins import PlainRanks

COUNTS = {"actor": UpdateCounts(3, 2)}


class Saving:
    """A Saver over two ranks that write a file each. is_slow: rank 1 isn't done unless it must be."""

    def __init__(self, folder: Path, *, is_slow: bool = False, failure: str | None = None, **settings: object) -> None:
        self.told: list[str] = []
        self.folder, self.is_slow, self.failure = CheckpointFolder(folder / "checkpoints"), is_slow, failure
        self.ranks = PlainRanks(2, self.answer)
        self.saver = Saver(self.ranks, self.folder, SaveSettings(**settings), self.told.append)  # type: ignore[arg-type]

    def answer(self, rank: int, verb: str, argument: object) -> SavedPart | None:
        """Do as a rank does."""
        if isinstance(argument, SaveWork):
            self.partial = Path(argument.folder)
            (self.partial / f"rank{rank}").write_text(str(rank))
            return None
        assert verb == "saved"
        if rank == 1 and self.is_slow and not argument:
            return None
        if rank == 1 and self.failure:
            return SavedPart(failure=self.failure)
        return SavedPart((hashed(self.partial, f"rank{rank}"),), COUNTS)

    def save(self, step: int, *, is_last: bool = False) -> None:
        """Save a state without more in it."""
        self.saver.save(TrainerState(step, step, None), is_last=is_last)


def test_what_the_ranks_wrote_and_the_controllers_state_become_a_checkpoint(tmp_path: Path) -> None:
    saving = Saving(tmp_path, models=False)
    saving.save(3)
    folder = saving.folder.of(3)
    verify(folder, read_manifest(folder))
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "rank0", "rank1", "trainer_state.json"]
    assert read_trainer_state(folder).updates == COUNTS
    (work,) = {argument for verb, arguments in saving.ranks.calls if verb == "save" for argument in arguments}
    assert (work.models, work.state, work.in_background) == (False, True, False)


def test_a_save_is_due_so_many_minutes_after_the_last_or_the_start_and_never_unless_asked_for(tmp_path: Path) -> None:
    saving, now_s = Saving(tmp_path, every_min=1.5), [1000.0]
    settings = saving.saver.settings
    saver = Saver(saving.ranks, saving.folder, settings, saving.told.append, lambda: now_s[0])
    due = []
    for now_s[0] in (1089.0, 1090.0, 1180.0):
        due.append(saver.is_due())
    saver.save(TrainerState(3, 3, None), is_last=False)
    for now_s[0] in (1181.0, 1269.0, 1270.0):
        due.append(saver.is_due())
    assert due == [False, True, True, False, False, True]
    saver.settings = SaveSettings()
    assert not saver.is_due()


def test_a_save_in_the_background_is_there_once_every_rank_is_done(tmp_path: Path) -> None:
    saving = Saving(tmp_path, is_slow=True, in_background=True)
    saving.save(1)
    saving.saver.poll()
    assert saving.folder.steps() == []
    saving.is_slow = False
    saving.saver.poll()
    assert saving.folder.steps() == [1]
    saving.saver.poll()  # there is nothing more to do
    assert saving.ranks.verbs().count("saved") == 3


def test_the_next_save_waits_for_the_one_before_and_the_last_for_itself(tmp_path: Path) -> None:
    saving = Saving(tmp_path, is_slow=True, in_background=True)
    saving.save(1)
    saving.save(2)
    assert saving.folder.steps() == [1]
    saving.save(3, is_last=True)
    assert saving.folder.steps() == [1, 2, 3]


def test_checkpoints_that_do_not_stay_are_removed_after_a_save(tmp_path: Path) -> None:
    saving = Saving(tmp_path, kept=Kept(last=2))
    for step in range(1, 5):
        saving.save(step)
    assert saving.folder.steps() == [3, 4]


def test_where_no_checkpoint_has_the_metric_of_the_best_that_is_told_once(tmp_path: Path) -> None:
    saving = Saving(tmp_path, kept=Kept(last=1, best_by="val/reward_meen"))
    for step in range(1, 5):
        saving.save(step)
    (told,) = saving.told
    assert told.startswith("step 1 is removed: no checkpoint has the metric 'val/reward_meen' of trainer.keep_best_by")


@pytest.mark.parametrize("must_succeed", [True, False])
def test_a_save_that_fails_ends_the_run_or_is_told_and_leaves_the_one_before(
    tmp_path: Path, must_succeed: bool
) -> None:
    saving = Saving(tmp_path, must_succeed=must_succeed)
    saving.save(1)
    saving.failure = "the disk is full"
    if must_succeed:
        with pytest.raises(ResourceError, match="the disk is full"):
            saving.save(2)
    else:
        saving.save(2)
        assert saving.told == ["step 2 is not saved: the disk is full"]
    assert saving.folder.steps() == [1] and not list(saving.folder.path.glob(".*"))
    saving.failure = None
    saving.save(3)
    assert saving.folder.steps() == [1, 3]
