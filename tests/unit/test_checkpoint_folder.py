"""The checkpoints of a run: which there are, which stay, and that none is half there."""

from __future__ import annotations

from pathlib import Path

import pytest

from megarl.checkpoint.folder import CheckpointFolder, Kept, verified
from megarl.checkpoint.manifest import hashed
from megarl.checkpoint.trainer_state import FILE_NAME, TrainerState, write_trainer_state
from megarl.checkpoints import main
from megarl.errors import CheckpointError
from megarl.monitor.rundir import run_folder


def save(folder: CheckpointFolder, step: int, *, is_last: bool = False, **metrics: float) -> Path:
    partial = folder.begin(step)
    write_trainer_state(partial, TrainerState(step, step, None, metrics=metrics))
    return folder.commit(partial, step, [hashed(partial, FILE_NAME)], is_last=is_last)


def test_saved_steps_are_listed_in_order_and_linked(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    assert folder.steps() == []
    for step in (2, 4, 10):
        save(folder, step)
    assert folder.steps() == [2, 4, 10]
    assert (folder.path / "latest").resolve() == folder.of(10)
    save(folder, 12, is_last=True)
    assert (folder.path / "latest").resolve() == (folder.path / "final").resolve() == folder.of(12)


def test_a_save_that_was_broken_off_is_no_checkpoint_and_leaves_no_trace(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    save(folder, 1)
    (folder.begin(2) / "half").write_text("")
    assert folder.steps() == [1]
    folder.remove_leftovers()
    assert sorted(path.name for path in folder.path.iterdir()) == ["latest", "step_1"]


def test_a_checkpoint_that_lost_its_manifest_is_not_passed_over(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    (save(folder, 3) / "manifest.json").unlink()
    assert folder.steps() == [3]
    with pytest.raises(CheckpointError, match=r"step_3 has no manifest\.json"):
        verified(folder.of(3))


def test_a_checkpoint_that_was_renamed_is_named(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    save(folder, 3).rename(folder.of(4))
    with pytest.raises(CheckpointError, match="step_4 holds step 3: it was renamed"):
        verified(folder.of(4))


def test_latest_leads_to_the_newest_that_is_there(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    for step in (1, 2):
        save(folder, step)
    latest = folder.path / "latest"
    folder.set_aside(2)
    assert latest.resolve() == folder.of(1)
    latest.unlink()
    latest.symlink_to("step_2")
    folder.remove_leftovers()
    assert latest.resolve() == folder.of(1)
    folder.set_aside(1)
    assert not latest.is_symlink()


def test_a_leftover_that_is_a_link_goes_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    save(folder, 1)
    (tmp_path / "elsewhere").mkdir()
    (folder.path / ".step_2.partial").symlink_to(tmp_path / "elsewhere")
    folder.remove_leftovers()
    assert (tmp_path / "elsewhere").is_dir() and not list(folder.path.glob(".*"))


def test_a_damaged_checkpoint_is_never_the_best(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    for step, value in enumerate((0.1, 0.9, 0.2), start=1):
        save(folder, step, score=value)
    (folder.of(2) / FILE_NAME).write_text("{")
    folder.prune(Kept(last=1, best_by="score"))
    assert folder.steps() == [3]


def test_a_checkpoint_is_never_written_over(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    save(folder, 3)
    with pytest.raises(CheckpointError, match="step_3 exists; a checkpoint is never written over another"):
        folder.begin(3)
    assert folder.set_aside(3).name == "step_3.damaged"
    save(folder, 3)
    assert folder.set_aside(3).name == "step_3.damaged2"


@pytest.mark.parametrize(
    ("kept", "left"),
    [
        (Kept(), [1, 2, 3, 4, 5]),
        (Kept(last=2), [4, 5]),
        (Kept(last=9), [1, 2, 3, 4, 5]),
        (Kept(last=1, best_by="val/reward_mean"), [3, 5]),
        (Kept(last=1, best_by="-val/reward_mean"), [2, 5]),
        (Kept(last=1, best_by="unknown"), [5]),
    ],
)
def test_the_newest_and_the_best_stay(tmp_path: Path, kept: Kept, left: list[int]) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    for step, value in enumerate((0.1, 0.0, 0.7, 0.2), start=1):
        save(folder, step, **{"val/reward_mean": value})
    save(folder, 5)  # without the metric
    gone = folder.prune(kept)
    assert folder.steps() == left and gone == sorted({1, 2, 3, 4, 5} - set(left))
    assert not list(folder.path.glob(".*"))


def test_checkpoints_of_a_run_that_is_going_on_are_not_pruned_under_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = CheckpointFolder(tmp_path / "run" / "checkpoints")
    with run_folder(tmp_path / "run", {}, [f"trainer.run_dir={tmp_path / 'run'}"]) as run_dir:
        for step in (1, 2):
            save(folder, step)
        folder.begin(3)  # which pruning would take for a leftover
        with pytest.raises(SystemExit):
            main([str(run_dir), "--keep", "1"])
        assert "has a run that is going on; trainer.keep_checkpoints prunes it meanwhile" in capsys.readouterr().err
        assert folder.steps() == [1, 2] and (folder.path / ".step_3.partial").is_dir()
    assert main([str(run_dir), "--keep", "1"]) == 0
    assert folder.steps() == [2] and not list(folder.path.glob(".*"))


@pytest.mark.parametrize("best_by", ["val/reward_meen", "-val/reward_meen"])
def test_nothing_is_pruned_by_a_metric_that_no_checkpoint_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], best_by: str
) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    for step in (1, 2):
        save(folder, step, **{"val/reward_mean": 0.5})
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--keep", "1", f"--best-by={best_by}"])
    assert f"has the metric '{best_by}'; they have val/reward_mean" in capsys.readouterr().err
    assert folder.steps() == [1, 2]


def test_nothing_is_pruned_where_the_newest_is_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    for step in (1, 2):
        save(folder, step)
    (folder.of(2) / FILE_NAME).write_text("{")
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--keep", "1"])
    assert "step_2 isn't as it was saved" in capsys.readouterr().err
    assert folder.steps() == [1, 2]
