"""The programs of megarl by name, and what they do where their reader has seen enough."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import megarl
from megarl.__main__ import PROGRAMS, main


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m megarl`` with some arguments."""
    return subprocess.run([sys.executable, "-m", "megarl", *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_every_program_is_listed_with_a_line(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines() if line.startswith("  ")]
    assert (done.returncode, done.stderr) == (0, "")
    assert lines == [[name, program.line] for name, program in PROGRAMS.items()]


def test_a_program_gets_the_rest_of_the_command_line_and_its_exit_code_passes() -> None:
    done = run("ppo", "experiment=quickstart", "data.train_batch_sise=4", "--cfg", "job")
    assert done.returncode == 0 and "train_batch_sise: 4" in done.stdout
    assert run("plan", "experiment=nothing").returncode == 2


def test_a_program_tells_its_own_usage() -> None:
    assert run("sft", "--help").stdout.startswith("usage: python -m megarl.main_sft ")
    assert run("prepare", "--help").stdout.startswith("usage: python -m megarl.data.prepare ")


def test_a_wrong_name_is_an_error_with_the_nearest() -> None:
    done = run("pop")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("megarl: there is no program 'pop'. did you mean 'ppo'?")


def test_the_installed_command_is_the_same() -> None:
    [command] = entry_points(group="console_scripts", name="megarl")
    assert command.load() is main


@pytest.mark.parametrize(
    "arguments",
    [
        "megarl",
        "megarl.main_ppo --help",
        "megarl.main_sft --cfg job",
        "megarl.data.prepare --help",
        "megarl.plan --help",
    ],
)
def test_a_reader_that_has_seen_enough_ends_a_program_without_a_word(arguments: str) -> None:
    command = f"{sys.executable} -u -m {arguments} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode in (0, 141)  # 128 + SIGPIPE


def test_every_module_that_a_user_runs_is_a_program() -> None:
    package = Path(megarl.__file__).parent
    modules = {path for path in package.rglob("*.py") if '__name__ == "__main__"' in path.read_text(encoding="utf-8")}
    names = {".".join(("megarl", *path.relative_to(package).with_suffix("").parts)) for path in modules}
    for_maintainers = {"megarl.__main__", "megarl.config.docs", "megarl.from_verl.docs"}
    for_launchers = {"megarl.nodes.__main__", "megarl.doctor.nodes", "megarl.launchers.ray_ready"}
    for_launchers |= {"megarl.ranks.sglang_process", "megarl.gpu_check.ranks"}
    for_others = {"megarl.gpu_check.__main__", "megarl.doctor.toolchain"}  # for the doctor, and for make gpu
    assert {name.removesuffix(".__main__") for name in names - for_maintainers - for_launchers - for_others} == {
        program.module for program in PROGRAMS.values()
    }
