"""A process is killed at every point where a save touches the disk, one after the other: nothing is ever half there."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megarl.checkpoint.folder import CheckpointFolder, Kept, verified_state
from megarl.checkpoint.manifest import hashed
from megarl.checkpoint.role_files import SavedRole, file_name
from megarl.checkpoint.tensor_file import write_tensors
from megarl.checkpoint.trainer_state import FILE_NAME, TrainerState, write_trainer_state
from megarl.errors import CheckpointError
from megarl.train.held_state import UpdateCounts

# What Python tells of a process that touches the disk, before it does.
TOUCHES = frozenset({"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.truncate"})
OLD, NEW = 2, 4
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Save:
    """A save of some ranks' parts, drawn by a seed."""

    seed: int

    @property
    def kept(self) -> Kept:
        """Which checkpoints stay: with one of the seeds the old one is removed, which takes points of its own."""
        return Kept(last=1 if self.seed == 1 else None)

    def weights(self, step: int) -> torch.Tensor:
        """Return what is saved at a step."""
        return torch.rand(64, 8, generator=torch.Generator().manual_seed(100 * self.seed + step))

    def __call__(self, folder: CheckpointFolder, step: int) -> None:
        """Save as ranks and controller do."""
        partial, files = folder.begin(step), []
        num_ranks = random.Random(self.seed).randint(1, 3)
        for rank in range(num_ranks):
            rows = range(64 * rank // num_ranks, 64 * (rank + 1) // num_ranks)
            part = {f"weight/w[{rows.start}:{rows.stop},0:8]": self.weights(step)[rows.start : rows.stop]}
            files.append(write_tensors(partial, file_name("actor", rank), part))
        write_trainer_state(partial, TrainerState(step, step, None, {"actor": UpdateCounts(step, step)}))
        files.append(hashed(partial, FILE_NAME))
        folder.commit(partial, step, files, is_last=self.seed == 2)
        folder.prune(self.kept)

    def assert_whole(self, folder: CheckpointFolder, step: int) -> None:
        """Verify a checkpoint, and compare its weights with those that were saved."""
        assert verified_state(folder.of(step)).step == step
        assert SavedRole(folder.of(step), "actor").read("w", 0, 0, 64).equal(self.weights(step))


def killed_at(point: int, work: Callable[[], object]) -> bool:
    """Do some work in a process that is killed before it touches the disk for the n-th time; return whether it was."""
    child = os.fork()
    if child == 0:
        try:
            _die_at(point)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return os.WIFSIGNALED(status)


def _die_at(point: int) -> None:
    left = point

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if event in TOUCHES:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_save_that_is_killed_anywhere_leaves_whole_checkpoints_and_is_repeated(tmp_path: Path, seed: int) -> None:
    save, point = Save(seed), 0
    names = set()
    while True:
        point += 1
        folder = CheckpointFolder(tmp_path / str(point) / "checkpoints")
        save(folder, OLD)
        was_killed = killed_at(point, lambda folder=folder: save(folder, NEW))  # type: ignore[misc]
        steps = folder.steps()
        names.add((was_killed, tuple(steps)))
        for step in steps:
            save.assert_whole(folder, step)
        folder.remove_leftovers()  # as the next start does
        links = {"latest", "final"} if seed == 2 else {"latest"}
        assert {path.name for path in folder.path.iterdir()} == {*(f"step_{step}" for step in steps), *links}
        assert (folder.path / "latest").resolve() == folder.of(steps[-1])
        if NEW in steps:
            with pytest.raises(CheckpointError, match="never written over another"):
                folder.begin(NEW)
        else:
            save(folder, NEW)
        save.assert_whole(folder, NEW)
        if not was_killed:
            break
    assert point > 15
    assert {(True, (OLD,)), (True, (OLD, NEW))} <= names, "no point before, or none after, the checkpoint has its name"


def test_every_point_is_reached_and_in_order(tmp_path: Path) -> None:
    def work() -> None:
        for name in "abc":
            (tmp_path / name).mkdir()

    left = []
    for point in range(1, 5):
        left.append((killed_at(point, work), sorted(path.name for path in tmp_path.iterdir())))
        for path in tmp_path.iterdir():
            path.rmdir()
    assert left == [(True, []), (True, ["a"]), (True, ["a", "b"]), (False, ["a", "b", "c"])]
