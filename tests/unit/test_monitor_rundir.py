"""A run folder tells what was run, belongs to one run at a time and is never written over."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from megarl.errors import ConfigError, ResourceError
from megarl.monitor.rundir import describe_environment, forget_later_steps, git_commit, run_folder, write_description


def git(folder: Path, *arguments: str) -> None:
    """Run git as a user without any configuration of their own."""
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.com", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def start(path: Path, *overrides: str, seed: int = 1) -> Path:
    """Start a run in a folder and let it go again, as one that fails does."""
    with run_folder(path, {"seed": seed}, overrides) as folder:
        return folder


def finish_step(folder: Path, step: int = 1) -> None:
    """Leave what a run leaves that finished a step."""
    (folder / "metrics.jsonl").write_text("".join(f'{{"step": {i}}}\n' for i in range(step + 1)), encoding="utf-8")


def test_a_new_folder_holds_config_overrides_and_environment(tmp_path: Path) -> None:
    config = {"actor": {"lr": 1e-6, "files": ["a.parquet"]}, "seed": None}
    with run_folder(tmp_path / "outputs" / "run", config, ["actor.lr=1e-6"]) as folder:
        assert yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) == config
        assert yaml.safe_load((folder / "overrides.yaml").read_text(encoding="utf-8")) == ["actor.lr=1e-6"]
        assert (folder / "environment.txt").read_text(encoding="utf-8").startswith("python: ")


def test_a_folder_says_what_its_run_was_until_another_start_goes_on(tmp_path: Path) -> None:
    folder, config = start(tmp_path / "run"), tmp_path / "run" / "config.yaml"
    (folder / "checkpoints" / "step_3").mkdir(parents=True)
    with run_folder(folder, {"seed": 2}, [], may_go_on=True):
        assert yaml.safe_load(config.read_text(encoding="utf-8")) == {"seed": 1}
        write_description(folder, {"seed": 2}, [])
    assert yaml.safe_load(config.read_text(encoding="utf-8")) == {"seed": 2}


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    assert start(tmp_path) == tmp_path


@pytest.mark.parametrize("way", ["metrics", "checkpoint"])
def test_a_folder_in_which_a_run_finished_a_step_is_refused_and_left_alone(tmp_path: Path, way: str) -> None:
    folder = start(tmp_path / "run")
    if way == "metrics":
        finish_step(folder)
    else:
        (folder / "checkpoints" / "step_3").mkdir(parents=True)
    with pytest.raises(ConfigError, match="exists and is not empty: a run finished a step in it"):
        start(folder, seed=2)
    assert yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) == {"seed": 1}


def test_a_run_that_ended_early_and_saved_nothing_starts_again_and_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = start(tmp_path / "run", "trainer.run_dir=run")
    finish_step(folder, step=3)
    with run_folder(folder, {"seed": 2}, ["trainer.run_dir=run"], may_go_on=True):
        assert not (folder / "metrics.jsonl").exists()
        finish_step(folder, step=1)
        (folder / "report.txt").write_text("", encoding="utf-8")
    kept = folder / "earlier_starts" / "1"
    assert yaml.safe_load((kept / "config.yaml").read_text(encoding="utf-8")) == {"seed": 1}
    assert len((kept / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 4
    assert capsys.readouterr().out == f"a run ended after step 3 and saved nothing: it is in {kept}, and starts again\n"
    with (
        pytest.raises(ConfigError, match="a run finished a step in it"),
        run_folder(folder, {}, ["trainer.run_dir=run"], may_go_on=True),
    ):
        raise AssertionError("a run that has come to its end is not taken for one that hasn't")


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"exists and is not empty \(thesis\.txt\)"):
        start(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_start_that_finished_no_step_leaves_the_folder_to_the_same_command(tmp_path: Path) -> None:
    folder = start(tmp_path / "run", "trainer.run_dir=run")
    finish_step(folder, step=0)  # a validation before training
    (folder / "checkpoints" / "step_1.partial").mkdir(parents=True)
    assert start(folder, "trainer.run_dir=run", seed=2) == start(folder, "trainer.run_dir=run", seed=3) == folder
    assert yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) == {"seed": 3}
    assert not (folder / "metrics.jsonl").exists()
    first, second = (folder / "earlier_starts" / name for name in ("1", "2"))
    assert (first / "metrics.jsonl").exists() and (first / "checkpoints" / "step_1.partial").is_dir()
    assert yaml.safe_load((second / "config.yaml").read_text(encoding="utf-8")) == {"seed": 2}


def test_a_folder_in_use_is_refused_though_no_step_is_finished(tmp_path: Path) -> None:
    with run_folder(tmp_path / "run", {}, []), pytest.raises(ConfigError, match="is in use by another run"):
        start(tmp_path / "run")
    assert not (tmp_path / "run" / "earlier_starts").exists()


OWN_NAME = "run_2026_01_02_03_04_05"


def test_a_name_of_megarls_own_gets_a_number_where_it_is_taken(tmp_path: Path) -> None:
    names = [start(tmp_path / OWN_NAME).name for _ in range(3)]
    assert names == [OWN_NAME, f"{OWN_NAME}_2", f"{OWN_NAME}_3"]


def test_a_name_of_megarls_own_that_the_user_typed_is_the_users(tmp_path: Path) -> None:
    finish_step(start(tmp_path / OWN_NAME))
    with pytest.raises(ConfigError, match="exists and is not empty"):
        start(tmp_path / OWN_NAME, f"trainer.run_dir={tmp_path / OWN_NAME}")


STARTS_AT_ONCE = """
import sys
from pathlib import Path
from megarl.monitor.rundir import run_folder
sys.stdin.readline()
with run_folder(Path(sys.argv[1]), {}, []) as folder:
    print(folder.name, flush=True)
    sys.stdin.readline()
"""


def test_runs_that_start_at_once_never_share_a_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-c", STARTS_AT_ONCE, str(tmp_path / OWN_NAME)]
    runs = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    for _ in ("start", "end"):
        for process in runs:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
    names = sorted(process.communicate()[0].strip() for process in runs)
    assert names == [OWN_NAME, *(f"{OWN_NAME}_{i}" for i in (2, 3, 4))]


def test_a_folder_is_free_again_once_the_process_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", STARTS_AT_ONCE, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    assert process.stdout.readline() == "run\n"
    process.kill()
    process.communicate()
    assert start(tmp_path / "run") == tmp_path / "run"


def test_a_path_through_a_file_is_refused_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    for path in (tmp_path / "file" / "run", tmp_path / "file"):
        with pytest.raises(ConfigError, match="can't be made") as caught:
            start(path)
        assert str(path) in str(caught.value)


def test_a_folder_that_can_not_be_written_is_named_in_one_line_with_its_room() -> None:
    with pytest.raises(
        ResourceError, match=r"^/sys/run can't be written: .*; the disk of /sys has \d+ bytes free"
    ) as e:
        start(Path("/sys/run"))  # where nobody may make a folder, root included
    assert "\n" not in str(e.value)


def interrupted(path: Path, *left: str, may_go_on: bool = True) -> str:
    """Interrupt a run that has left some folders and two finished steps; return what is said."""
    try:
        with run_folder(path, {}, [], "model.path", may_go_on=may_go_on) as folder:
            for name in left:
                (folder / "checkpoints" / name).mkdir(parents=True)
                finish_step(folder, step=2)
            raise KeyboardInterrupt
    except KeyboardInterrupt as interrupt:
        [note] = interrupt.__notes__
        return note


def test_an_interrupt_says_what_is_saved_and_how_to_go_on(tmp_path: Path) -> None:
    saved = tmp_path / "a" / "checkpoints" / "step_1"
    assert interrupted(tmp_path / "a", "step_1", "step_2.partial") == (
        f"interrupted after step 2; its metrics are in {tmp_path / 'a'}; "
        f"weights of step_1 are saved: go on from them with model.path={saved}"
    )
    damaged = interrupted(tmp_path / "damaged", "step_1", "step_3.damaged", "step_3.damaged2")
    assert "weights of step_1 are saved" in damaged
    assert interrupted(tmp_path / "b", "step_1/critic").endswith(
        f"critic.model.path={tmp_path / 'b'}/checkpoints/step_1/critic"
    )
    assert interrupted(tmp_path / "e", "step_2/state").endswith(
        f"; step_2 is saved: the same command with trainer.run_dir={tmp_path / 'e'} goes on after it"
    )
    assert interrupted(tmp_path / "never", "step_2/state", may_go_on=False).endswith(
        f"trainer.run_dir={tmp_path / 'never'} trainer.resume=auto goes on after it"
    )
    assert "nothing was saved (trainer.save_freq" in interrupted(tmp_path / "c", "step_2.partial")
    assert interrupted(tmp_path / "f", "step_2.partial", may_go_on=False).endswith("with another trainer.run_dir")
    assert interrupted(tmp_path / "d") == (
        f"interrupted before a step was finished; the same command starts again. run folder: {tmp_path / 'd'}"
    )
    assert start(tmp_path / "d") == tmp_path / "d"


def test_metrics_of_later_steps_are_forgotten_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    finish_step(tmp_path, step=5)
    metrics, before = tmp_path / "metrics.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    whole = metrics.read_text(encoding="utf-8")
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))
    try:
        with pytest.raises(ResourceError, match=r"metrics\.jsonl can't be written: File too large"):
            forget_later_steps(tmp_path, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert metrics.read_text(encoding="utf-8") == whole
    assert (tmp_path / "metrics.jsonl.partial").exists()
    forget_later_steps(tmp_path, 3)
    assert metrics.read_text(encoding="utf-8") == "".join(whole.splitlines(keepends=True)[:4])
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


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
