"""Saves of a run: the ranks write, the controller makes a checkpoint of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from megarl.checkpoint.folder import CheckpointFolder, Kept
from megarl.checkpoint.manifest import hashed
from megarl.checkpoint.rollouts_ahead import FILE_NAME as AHEAD_FILE_NAME
from megarl.checkpoint.rollouts_ahead import write_rollouts_ahead
from megarl.checkpoint.trainer_state import FILE_NAME, TrainerState, write_trainer_state
from megarl.errors import ResourceError
from megarl.launchers.group import WorkerGroup, everywhere
from megarl.monitor.disk import refusals_named
from megarl.ranks.work import SaveWork
from megarl.ranks.worker import Worker

_ALL = Kept()


@dataclass(frozen=True)
class SaveSettings:
    """models, state: what is saved. in_background: train on meanwhile. must_succeed: whether a failure ends the run.

    every_min: minutes without a save after which one is due; None: never.
    """

    models: bool = True
    state: bool = True
    in_background: bool = False
    must_succeed: bool = True
    kept: Kept = _ALL
    every_min: float | None = None


@dataclass(frozen=True)
class _UnderWay:
    partial: Path
    state: TrainerState
    is_last: bool


class Saver:
    """Saves a run's checkpoints, one at a time. warn: tells a person of a save that failed. clock: of seconds."""

    def __init__(
        self,
        group: WorkerGroup,
        folder: CheckpointFolder,
        settings: SaveSettings,
        warn: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.group, self.folder, self.settings, self.warn, self.clock = group, folder, settings, warn, clock
        self._last_s = clock()
        self._under_way: _UnderWay | None = None
        self._has_told = False

    def is_due(self) -> bool:
        """Whether there was no save for as long as the settings allow, nor the run's start."""
        every_min = self.settings.every_min
        return every_min is not None and self.clock() - self._last_s >= 60 * every_min

    def save(self, state: TrainerState, *, is_last: bool) -> None:
        """Save the run after ``state.step``; the one before has ended then. The last is there when this returns."""
        self.finish()
        self._last_s = self.clock()
        settings = self.settings
        with self._failures_told(state.step):
            with refusals_named(self.folder.path):
                partial = self.folder.begin(state.step)
            background = settings.in_background and not is_last
            work = SaveWork(str(partial), settings.models, settings.state, background)
            everywhere(self.group, Worker.save, work)
            self._under_way = _UnderWay(partial, state, is_last)
            self._collect(must_end=not background)

    def poll(self) -> None:
        """Make a checkpoint of a save that the ranks have ended meanwhile."""
        self._collect(must_end=False)

    def finish(self) -> None:
        """Wait for the save that is under way, if one is."""
        self._collect(must_end=True)

    def _collect(self, *, must_end: bool) -> None:
        if self._under_way is None:
            return
        save = self._under_way
        with self._failures_told(save.state.step):
            parts = everywhere(self.group, Worker.saved, must_end)
            if any(part is None for part in parts):
                return
            self._under_way = None
            whole = [part for part in parts if part is not None]
            for part in whole:
                if part.failure is not None:
                    raise ResourceError(part.failure)
            with refusals_named(save.partial):
                write_trainer_state(save.partial, replace(save.state, updates=whole[0].updates))
                files = [file for part in whole for file in part.files]
                files.append(hashed(save.partial, FILE_NAME))
                if save.state.ahead is not None:
                    write_rollouts_ahead(save.partial, save.state.ahead)
                    files.append(hashed(save.partial, AHEAD_FILE_NAME))
                self.folder.commit(save.partial, save.state.step, files, is_last=save.is_last)
                self._prune()

    def _prune(self) -> None:
        """Remove the checkpoints that don't stay; tell, once, where nothing says which of them was the best."""
        kept = self.settings.kept
        gone = self.folder.prune(kept)
        if gone and kept.best_by is not None and not self._has_told and self.folder.best(kept.best_by) is None:
            self._has_told = True
            self.warn(
                f"step {gone[-1]} is removed: no checkpoint has the metric {kept.best_by!r} of trainer.keep_best_by; "
                "one has the metrics of its step, with those of a validation in it"
            )

    @contextmanager
    def _failures_told(self, step: int) -> Iterator[None]:
        """Where a save need not succeed, tell of its failure, leave nothing of it behind, and let the run go on."""
        try:
            yield
        except ResourceError as error:
            self._under_way = None
            self.folder.remove_leftovers()
            if self.settings.must_succeed:
                raise
            self.warn(f"step {step} is not saved: {error}")
