"""A run folder tells what was run and is never written over."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from megarl.errors import ConfigError
from megarl.monitor.rundir import create_run_dir, describe_environment, git_commit


def git(folder: Path, *arguments: str) -> None:
    """Run git as a user without any configuration of their own."""
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.com", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_a_new_folder_holds_config_overrides_and_environment(tmp_path: Path) -> None:
    config = {"actor": {"lr": 1e-6, "files": ["a.parquet"]}, "seed": None}
    folder = create_run_dir(tmp_path / "outputs" / "run", config, ["actor.lr=1e-6"])
    assert yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) == config
    assert yaml.safe_load((folder / "overrides.yaml").read_text(encoding="utf-8")) == ["actor.lr=1e-6"]
    assert (folder / "environment.txt").read_text(encoding="utf-8").startswith("python: ")


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    assert create_run_dir(tmp_path, {}, []) == tmp_path


def test_a_folder_of_another_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    create_run_dir(tmp_path / "run", {"seed": 1}, [])
    with pytest.raises(ConfigError, match="exists and is not empty"):
        create_run_dir(tmp_path / "run", {"seed": 2}, [])
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")) == {"seed": 1}


def test_a_path_through_a_file_is_refused_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="can't be made") as caught:
        create_run_dir(tmp_path / "file" / "run", {}, [])
    assert str(tmp_path / "file" / "run") in str(caught.value)


def test_the_environment_names_python_packages_and_machine() -> None:
    facts = dict(line.split(": ", 1) for line in describe_environment().splitlines())
    assert facts["python"].startswith(platform.python_version())
    assert facts["numpy"] == version("numpy")
    assert int(facts["cpu_count"]) >= 1
    assert int(facts["memory_bytes"]) > 2**20
    assert facts["git_commit"]


def test_a_commit_is_named_and_changes_to_it_are_marked(tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet")
    (tmp_path / "file").write_text("a", encoding="utf-8")
    git(tmp_path, "add", "file")
    assert git_commit(tmp_path) == "none (no commit yet)"
    git(tmp_path, "commit", "--quiet", "--message", "m")
    commit = git_commit(tmp_path)
    assert len(commit) == 40
    (tmp_path / "file").write_text("b", encoding="utf-8")
    assert git_commit(tmp_path) == f"{commit} modified"


def test_a_folder_that_git_does_not_track_has_no_commit(tmp_path: Path) -> None:
    assert git_commit(tmp_path) == "none (not tracked by git)"
