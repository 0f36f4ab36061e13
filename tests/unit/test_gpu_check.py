"""The checks of the first hour on GPUs: their order, what is skipped, and the page, without a GPU."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megarl.errors import ConfigError, ResourceError, WorkerError
from megarl.gpu_check.__main__ import main
from megarl.gpu_check.checks import CHECKS, Check, Found, Machine, run_checks
from megarl.gpu_check.page import BEGIN, END, measured, put

CPU = Machine("cpu", 2, Path("nowhere"))


def fails(machine: Machine) -> Found:
    """Fail as a rank does."""
    raise WorkerError("rank 1 ended with 1:\nValueError: no such thing")


PASSES = Check("first", "nothing", lambda machine: Found(True, "as it should be", (("as it is", "1 | 2 | 3"),)))
CHECKED = (
    PASSES,
    replace(PASSES, name="second", run=fails, means="the ranks differ"),
    replace(PASSES, name="third", run=lambda machine: Found(False, "3 of 4")),
    replace(PASSES, name="on CUDA", needs="cuda"),
    replace(PASSES, name="on many", num_ranks=8),
)


def test_checks_run_in_order_one_that_fails_holds_up_none_and_what_is_lacking_is_named() -> None:
    results = list(run_checks(CPU, CHECKED))
    assert [(result.check.name, result.level) for result in results] == [
        ("first", "ok"),
        ("second", "FAIL"),
        ("third", "FAIL"),
        ("on CUDA", "skipped"),
        ("on many", "skipped"),
    ]
    assert results[3].text == "needs CUDA" and results[4].text == "needs 8 devices, and 2 are used"


def test_the_order_is_that_of_reliance_and_every_check_says_what_failing_means() -> None:
    names = [check.name for check in CHECKS]
    assert names[0] == "one device, without Transformer Engine" and names[-1].startswith("speed")
    assert names.index("publish and generate on two devices") < names.index("a step under torchrun")
    assert all(check.means for check in CHECKS) and len(set(names)) == len(names)
    on_one = [check.name for check in CHECKS if Machine("cuda", 1, Path("nowhere")).lacks(check) is None]
    assert "sleep and wake, memory read back" in on_one and "a step on Ray" not in on_one


def test_the_tables_hold_versions_results_their_meaning_and_speeds(tmp_path: Path) -> None:
    text = measured(CPU, "a machine", list(run_checks(CPU, CHECKED)), "the command")
    assert "| second | FAIL | ValueError: no such thing | the ranks differ |" in text
    assert "| as it is | 1 | 2 | 3 |" in text and "| torch | 2." in text
    page = tmp_path / "gpu.md"
    page.write_text(f"# Title\n{BEGIN}\nold\n{END}\nend\n")
    put(text, page)
    assert page.read_text() == f"# Title\n{BEGIN}\n{text}\n{END}\nend\n"


def test_a_page_without_markers_is_named(tmp_path: Path) -> None:
    page = tmp_path / "gpu.md"
    page.write_text("# Title\n")
    with pytest.raises(ResourceError, match="has no lines <!-- measured: begin -->"):
        put("text", page)


def test_a_name_that_no_check_has_is_named() -> None:
    with pytest.raises(ConfigError, match="a step on Ray"):
        main(["--only", "nonsense"])


def test_the_doctor_starts_the_checks_and_skips_what_needs_cuda(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megarl.doctor", "--gpu-check", "--only", "sleep"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("skipped sleep and wake, memory read back: needs CUDA\n")
    assert "| sleep and wake, memory read back | skipped | needs CUDA |" in done.stdout


@pytest.mark.long
def test_all_checks_pass_on_cpu_ranks_but_for_those_that_need_cuda(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megarl.doctor", "--gpu-check", "--nproc", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    skipped = [line for line in done.stdout.splitlines() if line.startswith("skipped ")]
    assert [line.partition(": ")[2] for line in skipped] == ["needs CUDA", "needs CUDA"]
    assert len([line for line in done.stdout.splitlines() if line.startswith("ok ")]) == len(CHECKS) - 2
