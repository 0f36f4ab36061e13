"""Runs that are broken off and go on from a checkpoint: every number and weight equals those of one that never was."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.forked import Ended, run_forked
from tests.run_folder import hashes, lines_of
from tests.tiny_task import NUM_RANKS

NUM_STEPS, SAVED = 4, 2
# With a critic, and a KL coefficient that moves: all that a run can carry from step to step.
PPO = (
    *("-m", "megarl.main_ppo", "--config-dir=.", "--config-name=rl", f"trainer.total_training_steps={NUM_STEPS}"),
    *("algorithm.adv_estimator=gae", "critic.enable=true", "critic.model.path=model", "critic.model.init=random"),
    *("algorithm.use_kl_in_reward=true", "algorithm.kl_ctrl.type=adaptive", "algorithm.kl_ctrl.horizon=100"),
    *("actor_rollout_ref.actor.use_kl_loss=false", "actor_rollout_ref.rollout.n=2"),
    *(f"trainer.save_freq={SAVED}", "trainer.val_before_train=false"),
)


def broken_off(whole: Path, name: str) -> Path:
    """Return a copy of a finished run as it was before its last checkpoint was saved."""
    folder = whole.with_name(name)
    shutil.copytree(whole, folder, symlinks=True)
    checkpoints = folder / "checkpoints"
    shutil.rmtree(checkpoints / f"step_{NUM_STEPS}")
    (checkpoints / "final").unlink()
    return folder


def go(tiny_task: Path, folder: Path, *overrides: str) -> Ended:
    """Run or go on in ``folder``."""
    return run_forked("run", (*PPO, f"trainer.run_dir={folder}", *overrides), tiny_task, num_ranks=NUM_RANKS)


@pytest.fixture(scope="module")
def whole(tiny_task: Path) -> Path:
    """Return the folder of a run that was never broken off."""
    folder = tiny_task / "runs" / "whole"
    finished = go(tiny_task, folder)
    assert finished.code == 0, finished.output
    return folder


def test_a_run_that_goes_on_equals_one_that_was_never_broken_off(tiny_task: Path, whole: Path) -> None:
    folder = broken_off(whole, "resumed")
    finished = go(tiny_task, folder)
    assert finished.code == 0, finished.output
    assert f"going on after step {SAVED} from {folder / 'checkpoints' / f'step_{SAVED}'}" in finished.stdout
    assert lines_of(folder) == lines_of(whole)
    assert [line["step"] for line in lines_of(folder)] == list(range(1, NUM_STEPS + 1))
    first, second = (hashes(run_dir / "checkpoints" / f"step_{NUM_STEPS}") for run_dir in (whole, folder))
    assert first == second and len(first) > 2


@pytest.mark.long
def test_a_finished_run_has_nothing_left_to_do(tiny_task: Path, whole: Path) -> None:
    before = lines_of(whole)
    finished = go(tiny_task, whole)
    assert finished.code == 0, finished.output
    assert f"all {NUM_STEPS} steps are done" in finished.stdout
    assert lines_of(whole) == before


@pytest.mark.long
def test_a_run_that_begins_at_a_checkpoint_of_another_equals_it_from_there_and_goes_on_with_its_own(
    tiny_task: Path, whole: Path
) -> None:
    folder, begin = whole.with_name("begun"), f"trainer.resume={whole / 'checkpoints' / f'step_{SAVED}'}"
    finished = go(tiny_task, folder, begin)
    assert finished.code == 0, finished.output
    assert lines_of(folder) == lines_of(whole)[SAVED:]
    first, second = (hashes(run_dir / "checkpoints" / f"step_{NUM_STEPS}") for run_dir in (whole, folder))
    assert first == second and len(first) > 2
    again = go(tiny_task, folder, begin)
    assert again.code == 0 and f"all {NUM_STEPS} steps are done" in again.stdout
