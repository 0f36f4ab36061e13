"""``python -m megarl.verify``: what it measures, what it writes, and that it tells of what is over its tolerance."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.launch import Finished, python, run
from tests.tiny_task import write_weights

COMMAND = python("-m", "megarl.verify", "--model=model", "--no-engine", "--max-ranks=4")
LAYOUTS = ("one_rank", "pp2", "tp2xdp2+sp")


@pytest.fixture(scope="module")
def folder(tiny_task: Path) -> Path:
    """Return a folder with model/, which has weights."""
    write_weights(tiny_task / "model")
    return tiny_task


def _verify(folder: Path, page: str, *more: str) -> Finished:
    return run([*COMMAND, f"--out={page}", *more], folder)


def _table(page: Path) -> dict[str, list[str]]:
    """Return the cells of the page's table by layout."""
    rows = [line.strip("|").split("|") for line in page.read_text().splitlines() if line.startswith("|")]
    return {name.strip(): [cell.strip() for cell in cells] for name, *cells in rows}


def test_each_layout_is_measured_and_the_page_says_what_was_found(folder: Path) -> None:
    finished = _verify(folder, "good.md", f"--layouts={','.join(LAYOUTS)}")
    assert finished.code == 0, finished.output
    table = _table(folder / "good.md")
    assert [name for name in table if name in LAYOUTS] == list(LAYOUTS)
    for name in LAYOUTS:
        num_ranks, logprobs, _in_bf16, *training, export, _engine = table[name]
        loss, grad_norm, distributed_grad_norm, *later = map(float, training)
        assert int(num_ranks) == {"one_rank": 1, "pp2": 2, "tp2xdp2+sp": 4}[name]
        assert 0 < float(logprobs) <= 2e-5
        assert max(loss, grad_norm, distributed_grad_norm) <= 1e-5
        assert max(later) <= 1e-4
        assert export == "equal"
    assert len([line for line in finished.stdout.splitlines() if re.match(r"\[ +\d/3\] ok", line)]) == len(LAYOUTS)
    assert finished.processes == ()


@pytest.mark.long
def test_a_figure_over_its_tolerance_is_named_and_ends_with_exit_code_1(folder: Path) -> None:
    finished = _verify(folder, "bad.md", "--layouts=one_rank", "--logprob-tolerance=0")
    assert finished.code == 1
    assert re.search(r"^model on one_rank: log-probs \S+ OVER 0\.0e\+00$", finished.stderr, re.MULTILINE)
    assert "1 failed" in (folder / "bad.md").read_text()


@pytest.mark.long
def test_what_there_is_no_time_for_is_left_out_and_counted(folder: Path) -> None:
    finished = _verify(folder, "short.md", f"--layouts={','.join(LAYOUTS)}", "--minutes=0.001")
    assert finished.code == 0, finished.output
    assert [name for name in _table(folder / "short.md") if name in LAYOUTS] == ["one_rank"]
    assert "There was no time for 2 more" in (folder / "short.md").read_text()


@pytest.mark.long
def test_every_layout_of_the_tiny_models_is_within_tolerance_and_engines_answer_as_hugging_face(folder: Path) -> None:
    command = python("-m", "megarl.verify", "--layouts=all", "--max-ranks=4", "--out=all.md")
    finished = run(command, folder, timeout_s=3600.0)
    assert finished.code == 0, finished.output
    rows = [line for line in (folder / "all.md").read_text().splitlines() if re.match(r"\| \w", line)]
    answered = [row for row in rows if row.endswith("| equal | equal |")]
    assert len(answered) == 2 * 3  # layouts with an engine, models
