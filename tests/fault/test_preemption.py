"""The machine is wanted back in the middle of a step: the run saves it and ends, and goes on as if nothing had been."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.launch import Finished, python, run, torchrun
from tests.run_folder import hashes, lines_of
from tests.tiny_task import NUM_RANKS

FAULTS = Path(__file__).parent / "faults"
NUM_STEPS = 4
SFT = ("-m", "megarl.main_sft", "--config-dir=.", "--config-name=sft", f"trainer.total_training_steps={NUM_STEPS}")
COMMANDS = {"ray": python(*SFT), "torchrun": torchrun(NUM_RANKS, *SFT)}
NAMED = ("bash", "-c", 'export MEGARL_TEST_COMMAND=$$; exec "$0" "$@"')
STOP_S = 60.0
LAUNCHERS = pytest.mark.parametrize("launcher", ["ray", "torchrun"])


@dataclass(frozen=True)
class Ended:
    """A run that was signalled, and its folder. stop_s: from then to its end."""

    finished: Finished
    folder: Path
    stop_s: float

    @property
    def saved(self) -> list[str]:
        """The names of all in its folder of checkpoints."""
        return sorted(path.name for path in (self.folder / "checkpoints").glob("*"))


def signalled(tiny_task: Path, launcher: str, name: str, fault: str, *overrides: str) -> Ended:
    """Start a run, or go on in its folder, with a signal in one of its calls, as faults/sitecustomize.py describes."""
    struck, folder = tiny_task / f"struck.{name}.{fault}", tiny_task / "runs" / name
    environ = {"MEGARL_TEST_FAULT": fault, "MEGARL_TEST_STRUCK": str(struck)}
    command = [*NAMED, *COMMANDS[launcher], f"trainer.run_dir={folder}", *overrides]
    finished = run(command, tiny_task, python_path=FAULTS, environ=environ)
    assert struck.is_file(), finished.output
    return Ended(finished, folder, finished.ended_s - float(struck.read_text()))


@pytest.fixture(scope="module")
def whole(tiny_task: Path) -> Path:
    """Return the folder of a run that was left in peace."""
    folder = tiny_task / "runs" / "whole"
    finished = run([*COMMANDS["torchrun"], f"trainer.run_dir={folder}"], tiny_task)
    assert finished.code == 0, finished.output
    return folder


def test_a_signal_to_torchrun_has_every_rank_go_on_until_the_step_is_saved(tiny_task: Path) -> None:
    ended = signalled(tiny_task, "torchrun", "saved", "SIGTERM:1:update:2")
    assert ended.finished.code == 1, ended.finished.output  # torchrun's own
    goes_on = f"step_2 is saved: the same command with trainer.run_dir={ended.folder} goes on after it\n"
    said = f"interrupted after step 2; its metrics are in {ended.folder}; {goes_on}"
    assert ended.finished.stderr.count(said) == 1
    assert "WorkerError" not in ended.finished.stderr
    assert ended.saved == ["latest", "step_2"]
    assert ended.finished.processes == ()


@pytest.mark.long
def test_a_run_that_is_stopped_by_signals_and_goes_on_equals_one_that_never_was(tiny_task: Path, whole: Path) -> None:
    first = signalled(tiny_task, "ray", "stopped", "SIGUSR1:1:update:1")
    goes_on = f"step_1 is saved: the same command with trainer.run_dir={first.folder} goes on after it"
    assert first.finished.code == 75, first.finished.output
    assert first.finished.stderr == f"interrupted after step 1; its metrics are in {first.folder}; {goes_on}\n"
    assert "SIGUSR1: the run saves at the end of this step, and ends" in first.finished.stdout
    assert first.saved == ["latest", "step_1"]

    second = signalled(tiny_task, "torchrun", "stopped", "SIGTERM:1:update:2")
    assert second.finished.code == 1, second.finished.output
    assert second.finished.stderr.count(f"interrupted after step 3; its metrics are in {first.folder}; step_3 is") == 1
    assert "WorkerError" not in second.finished.stderr
    assert second.saved == ["latest", "step_1", "step_3"]

    last = run([*COMMANDS["torchrun"], f"trainer.run_dir={first.folder}"], tiny_task)
    assert last.code == 0, last.output
    assert lines_of(first.folder) == lines_of(whole)
    final = [hashes(folder / "checkpoints" / f"step_{NUM_STEPS}") for folder in (whole, first.folder)]
    assert final[0] == final[1] and len(final[0]) > 2
    assert [ended.processes for ended in (first.finished, second.finished)] == [(), ()]


@pytest.mark.long
def test_a_signal_that_reaches_another_rank_alone_has_the_controller_save(tiny_task: Path) -> None:
    ended = signalled(tiny_task, "torchrun", "elsewhere", "here:1:update:2")
    assert "a signal to rank 1: the run saves at the end of this step" in ended.finished.stdout
    assert ended.saved == ["latest", "step_2"]
    assert ended.finished.processes == ()


@pytest.mark.long
@LAUNCHERS
def test_a_second_signal_ends_a_run_at_once_without_a_save(tiny_task: Path, launcher: str) -> None:
    ended = signalled(tiny_task, launcher, f"twice_{launcher}", "twice:1:update:2", "trainer.save_freq=1")
    assert ended.finished.code == {"ray": 75, "torchrun": 1}[launcher]
    assert "SIGTERM for the second time: ending at once" in ended.finished.output
    assert ended.saved == ["latest", "step_1"]
    assert ended.stop_s < STOP_S
    assert ended.finished.processes == ()


@pytest.mark.long
@LAUNCHERS
def test_a_step_that_is_not_done_by_the_deadline_is_an_error_and_no_half_checkpoint(
    tiny_task: Path, launcher: str
) -> None:
    overrides = "trainer.save_freq=1", "trainer.preempt_save_s=2"
    ended = signalled(tiny_task, launcher, f"late_{launcher}", "hold:1:update:2", *overrides)
    assert ended.finished.code == {"ray": 75, "torchrun": 1}[launcher]
    assert "ERROR: nothing new is saved 2 s after SIGTERM (trainer.preempt_save_s)" in ended.finished.output
    assert ended.saved == ["latest", "step_1"]
    assert ended.stop_s < STOP_S
    assert ended.finished.processes == ()
