"""The checkpoints of a run: one folder a step, each whole or not there at all, and links to the latest and the last."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megarl.checkpoint.manifest import FileRecord, Manifest, read_manifest, synced, verify, write_manifest
from megarl.checkpoint.trainer_state import TrainerState, read_trainer_state
from megarl.errors import CheckpointError

LATEST, FINAL = "latest", "final"
_STEP = re.compile(r"step_(\d+)")
_PARTIAL, _DAMAGED = ".partial", ".damaged"


@dataclass(frozen=True)
class Kept:
    """Which checkpoints stay: the newest ``last`` (None: all), and the one where the metric ``best_by`` is largest.

    A ``-`` before the metric's name: where it is least.
    """

    last: int | None = None
    best_by: str | None = None


def verified(checkpoint: Path) -> Manifest:
    """Return the Manifest of a checkpoint whose every byte is as it was saved. Raises CheckpointError for any other."""
    manifest = read_manifest(checkpoint)
    name = _STEP.fullmatch(checkpoint.name)
    if name is not None and int(name[1]) != manifest.step:
        raise CheckpointError(f"{checkpoint} holds step {manifest.step}: it was renamed; take another checkpoint")
    verify(checkpoint, manifest)
    return manifest


def verified_state(checkpoint: Path) -> TrainerState:
    """Return the controller's state in a checkpoint, every byte of which is verified before any is used.

    Raises CheckpointError for one that isn't as it was saved.
    """
    manifest, state = verified(checkpoint), read_trainer_state(checkpoint)
    if state.step != manifest.step:
        raise CheckpointError(f"{checkpoint} has the manifest of step {manifest.step}, the state of step {state.step}")
    return state


class CheckpointFolder:
    """The folder ``checkpoints`` of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints that were saved to their end, in order, as a list of ints.

        They have the name of one, which a save gives last: whether they are whole still is for ``verified`` to say.
        """
        if not self.path.is_dir():
            return []
        found = [(_STEP.fullmatch(path.name), path) for path in self.path.iterdir()]
        return sorted(int(name[1]) for name, path in found if name and path.is_dir())

    def of(self, step: int) -> Path:
        """Return the folder of a step's checkpoint."""
        return self.path / f"step_{step}"

    def begin(self, step: int) -> Path:
        """Make the folder to write a step's checkpoint into. Raises CheckpointError where the step has one."""
        if self.of(step).exists():
            raise CheckpointError(f"{self.of(step)} exists; a checkpoint is never written over another")
        partial = self.path / f".step_{step}{_PARTIAL}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        return partial

    def commit(self, partial: Path, step: int, files: Iterable[FileRecord], *, is_last: bool) -> Path:
        """Make a folder that is written a checkpoint, and link it. Return it."""
        write_manifest(partial, step, files)
        partial.rename(self.of(step))
        synced(self.path)
        for name in (LATEST, *([FINAL] if is_last else [])):
            self._link(name, step)
        return self.of(step)

    def prune(self, kept: Kept) -> list[int]:
        """Remove the checkpoints that don't stay, and return their steps as a list of ints."""
        if kept.last is None:
            return []
        steps = self.steps()
        best = None if kept.best_by is None else self.best(kept.best_by)
        gone = sorted(set(steps) - set(steps[-kept.last :]) - {best})
        for step in gone:
            self.of(step).rename(self.path / f".step_{step}{_PARTIAL}")  # first, so that none is half there
        self.remove_leftovers()
        return gone

    def best(self, best_by: str) -> int | None:
        """Return the step whose checkpoint a metric, named as in Kept, says is best; None where none has the metric."""
        name, sign = best_by.removeprefix("-"), -1 if best_by.startswith("-") else 1
        values = {step: self.metrics(step).get(name) for step in self.steps()}
        known = {step: sign * value for step, value in values.items() if value is not None}
        return max(known, key=lambda step: (known[step], step), default=None)

    def remove_leftovers(self) -> None:
        """Remove what saves that were broken off have left, and link the newest checkpoint if they hadn't yet."""
        if self.path.is_dir():
            for path in self.path.glob(f".*{_PARTIAL}"):
                if path.is_symlink():
                    path.unlink()  # what it leads to is not ours
                else:
                    shutil.rmtree(path, ignore_errors=True)
            self._link_newest()

    def link_final(self, step: int) -> None:
        """Have ``final`` lead to a step's checkpoint, if it is there and no checkpoint is the final one yet."""
        if self.of(step).is_dir() and not (self.path / FINAL).is_symlink():
            self._link(FINAL, step)

    def set_aside(self, step: int) -> Path:
        """Rename a checkpoint that isn't as it was saved, so that its step can be saved again. Return where it is."""
        path = self.of(step)
        for number in range(1, 1000):
            aside = path.with_name(f"{path.name}{_DAMAGED}{number if number > 1 else ''}")
            if not aside.exists():
                path.rename(aside)
                self._link_newest()
                return aside
        raise CheckpointError(f"{path}: too many damaged checkpoints of this step; remove some")

    def _link_newest(self) -> None:
        """Have ``latest`` lead to the newest checkpoint, or nowhere where there is none."""
        steps, latest = self.steps(), self.path / LATEST
        if not steps:
            latest.unlink(missing_ok=True)
        elif not latest.is_symlink() or os.readlink(latest) != self.of(steps[-1]).name:
            self._link(LATEST, steps[-1])

    def _link(self, name: str, step: int) -> None:
        new = self.path / f".{name}{_PARTIAL}"
        new.unlink(missing_ok=True)
        new.symlink_to(self.of(step).name)
        os.replace(new, self.path / name)
        synced(self.path)

    def metrics(self, step: int) -> Mapping[str, float]:
        """Return the metrics of a step; none where its checkpoint is damaged, which then isn't the best."""
        try:
            return read_trainer_state(self.of(step)).metrics
        except CheckpointError:
            return {}
