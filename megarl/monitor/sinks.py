"""Where metrics go: console, jsonl, TensorBoard, Weights & Biases, a timeline."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from megarl.catalog import SINKS
from megarl.errors import ConfigError, Problem, ResourceError, nearest
from megarl.monitor.console import Progress, stage_line
from megarl.monitor.disk import LineFile, refusals_named
from megarl.monitor.trace import TIMELINE, TraceSink

NON_FINITE = "monitor/non_finite"


class Sink(Protocol):
    """One place that takes the metrics of each step."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of a step."""

    def close(self) -> None:
        """Write out what is held and let go of files and connections."""


class JsonlSink:
    """Append one JSON object a step to a file, flushed each time: a killed run keeps its metrics."""

    def __init__(self, path: Path) -> None:
        self._file = LineFile(path)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one line. NaN and infinities become null: JSON has no word for them."""
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        record = {"step": step, "wall_time_s": time.time(), **finite}
        self._file.append(json.dumps(record, allow_nan=False) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorboardSink:
    """Write TensorBoard event files, with the tensorboard package alone (its writer in torch would load torch)."""

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboard.summary import Writer
        except ImportError as error:
            raise _not_installed("tensorboard") from error
        self._folder = folder
        with refusals_named(folder):
            self._writer: Any = Writer(str(folder))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add one point to the curve of each metric."""
        with refusals_named(self._folder):
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        with refusals_named(self._folder):
            self._writer.close()


class WandbSink:
    """Send metrics to Weights & Biases. Its own environment variables set the account, host and offline mode."""

    def __init__(self, folder: Path, project: str, experiment: str, config: Mapping[str, object]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _not_installed("wandb") from error
        try:
            self._run: Any = wandb.init(project=project, name=experiment, config=dict(config), dir=str(folder))
        except Exception as error:
            why = f"can't be opened: {type(error).__name__}: {error}"
            fix = "wandb login, or WANDB_MODE=offline in the environment, or take wandb out of trainer.logger"
            raise ConfigError([Problem("trainer.logger", "wandb", why, fix)]) from error

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the metrics of a step."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Wait until everything is sent."""
        self._run.finish()


class Tracker:
    """Give the metrics of each step to every sink. Use it as a context manager, or call ``close`` at the end."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = tuple(sinks)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log a step (counted from 1), with the number of its metrics that are NaN or infinite."""
        non_finite = sum(not math.isfinite(value) for value in metrics.values())
        for sink in self._sinks:
            sink.log(step, {**metrics, NON_FINITE: float(non_finite)})

    def wait_for(self, what: str) -> None:
        """Say in the console sink's bar, if there is one, what goes on now."""
        for sink in self._sinks:
            if isinstance(sink, Progress):
                sink.wait_for(what.replace("_", " "))

    def phase(self, name: str, start_s: float, end_s: float) -> None:
        """Give a phase that has ended to the timeline, if there is one. Seconds are of time.perf_counter."""
        for sink in self._sinks:
            if isinstance(sink, TraceSink):
                sink.phase(name, start_s, end_s)

    def engine(self, number: int, does: str, policy_version: int) -> None:
        """Give what an engine does from now on to the timeline, if there is one."""
        for sink in self._sinks:
            if isinstance(sink, TraceSink):
                sink.engine(number, does, policy_version)

    def stage(self, number: int, total: int, what: str) -> None:
        """Say which stage of a start begins, and in the bar that it goes on."""
        self.show(stage_line(number, total, what))
        self.wait_for(what)

    def show(self, text: str) -> None:
        """Write text, such as a table, to the console sink, if there is one."""
        for sink in self._sinks:
            if isinstance(sink, Progress):
                sink.write(text)

    def warn(self, text: str) -> None:
        """Write text that a person must see to the console sink, or to stderr where there is none."""
        if any(isinstance(sink, Progress) for sink in self._sinks):
            self.show(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Close every sink, also after one of them failed to close.

        Raises: ResourceError where a disk is all that failed, else ExceptionGroup with what the sinks raised.
        """
        failures: list[Exception] = []
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as error:  # noqa: BLE001 (the other sinks still hold metrics; raised below)
                failures.append(error)
        named = [error for error in failures if isinstance(error, ResourceError)]
        if failures and len(named) == len(failures):
            raise named[0]
        if failures:
            raise ExceptionGroup("some metrics may be lost: sinks failed to close", failures)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except (ResourceError, ExceptionGroup) as failure:
            if error is None:
                raise
            error.add_note(str(failure))  # the run's own error is what a person must act on


@dataclass(frozen=True)
class _Run:
    """What a sink may need to open."""

    folder: Path
    project: str
    experiment: str
    config: Mapping[str, object]
    total_steps: int | None


_OPEN: Mapping[str, Callable[[_Run], Sink]] = {
    "console": lambda run: Progress(run.total_steps, log_file=run.folder / "console.log"),
    "jsonl": lambda run: JsonlSink(run.folder / "metrics.jsonl"),
    "tensorboard": lambda run: TensorboardSink(run.folder / "tensorboard"),
    "trace": lambda run: TraceSink(run.folder / TIMELINE),
    "wandb": lambda run: WandbSink(run.folder, run.project, run.experiment, run.config),
}


def open_tracker(
    names: Sequence[str],
    run_dir: Path,
    project_name: str,
    experiment_name: str,
    config: Mapping[str, object],
    total_steps: int | None = None,
) -> Tracker:
    """Open the sinks that ``trainer.logger`` names, in an existing run folder.

    Raises: ConfigError for a name that is unknown or given twice, or for a sink whose package is not installed or that
    can't be opened; ResourceError where the disk refuses its file.
    """
    problems = [*map(_unknown, [name for name in names if name not in _OPEN])]
    if len(set(names)) < len(names):
        problems.append(Problem("trainer.logger", list(names), "names a sink twice", "name each sink once"))
    if problems:
        raise ConfigError(problems)
    run = _Run(run_dir, project_name, experiment_name, config, total_steps)
    sinks: list[Sink] = []
    try:
        for name in names:
            sinks.append(_OPEN[name](run))
    except BaseException:
        Tracker(sinks).close()
        raise
    return Tracker(sinks)


def _unknown(name: str) -> Problem:
    return Problem("trainer.logger", name, f"is not one of {', '.join(SINKS)}", nearest(name, SINKS))


def _not_installed(name: str) -> ConfigError:
    fix = f"pip install {name}, or take {name} out of trainer.logger"
    return ConfigError([Problem("trainer.logger", name, f"needs the package {name}, which is not installed", fix)])
