"""The terminal shows what matters and can't be confused by what a model wrote."""

from __future__ import annotations

import io
import math
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarl.monitor.console import MAX_CELL_LINES, Progress, RolloutRow, metrics_line, rollouts_table


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        """Say so."""
        return True


def columns(line: str) -> int:
    """Count terminal columns: wide characters take two, combining ones none."""
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in line
    )


def row(prompt: str = "2 + 2 =", response: str = "4", truth: str = "4", score: float = 1.0) -> RolloutRow:
    """Return a rollout with some texts replaced."""
    return RolloutRow(prompt, response, truth, score)


def test_a_line_shows_headline_metrics_in_their_order_and_leaves_out_the_rest() -> None:
    metrics = {"other": 7.0, "b": 0.123456, "a": 2.0}
    assert metrics_line(3, metrics, headline=("a", "b", "absent")) == "step 3  a 2  b 0.1235"


def test_a_line_shows_a_metric_that_is_not_finite_whatever_its_name() -> None:
    assert metrics_line(3, {"a": 1.0, "hidden": math.nan}, headline=("a",)) == "step 3  a 1  hidden nan"


def test_a_line_shows_failures_of_the_reward_where_there_are_any() -> None:
    metrics = {"reward/mean": 0.5, "reward/num_raised": 3.0, "reward/num_timeout": 0.0}
    assert metrics_line(3, metrics) == "step 3  reward/mean 0.5  reward/num_raised 3"


def test_a_log_file_gets_lines_and_no_bar() -> None:
    stream = io.StringIO()
    progress = Progress(total_steps=10, stream=stream, headline=("a",))
    progress.log(1, {"a": 1.0})
    progress.close()
    assert stream.getvalue() == "step 1  a 1\n"


def test_a_terminal_gets_a_bar_at_the_step() -> None:
    stream = Terminal()
    progress = Progress(total_steps=10, stream=stream, headline=("a",))
    progress.log(5, {"a": 1.0})
    progress.close()
    assert "step 5  a 1\n" in stream.getvalue()
    assert "5/10" in stream.getvalue()


def test_text_that_the_stream_cannot_encode_is_escaped() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    Progress(stream=stream).write("caf\u00e9")
    assert raw.getvalue() == b"caf\\xe9\n"


def test_a_table_has_the_texts_and_the_score_of_each_rollout() -> None:
    table = rollouts_table([row(score=0.5), row(prompt="3 + 3 =", response="7", truth="6", score=0.0)], width=80)
    assert [[cell.strip() for cell in line.split("|")] for line in table.splitlines() if "|" in line] == [
        ["score", "prompt", "response", "truth"],
        ["0.5", "2 + 2 =", "4", "4"],
        ["0", "3 + 3 =", "7", "6"],
    ]


def test_line_breaks_and_control_characters_are_shown_not_obeyed() -> None:
    table = rollouts_table([row(response="a\nb\x1b[2Jc\rd\u202ee\ud800f")], width=200)
    assert "a\\nb\\x1b[2Jc\\rd\\u202ee\\ud800f" in table
    assert len(table.splitlines()) == 3


def test_a_long_cell_keeps_its_beginning_and_its_end() -> None:
    table = rollouts_table([row(response="first " + "word " * 2000 + "last")], width=80)
    assert "first" in table
    assert "last" in table
    assert "..." in table
    assert len(table.splitlines()) == 2 + MAX_CELL_LINES


def test_words_stay_whole_where_they_fit() -> None:
    table = rollouts_table([row(prompt="natural numbers are closed under addition")], width=80)
    assert all(word in table for word in ("natural", "numbers", "closed", "under", "addition"))


def test_the_width_is_that_of_the_terminal_unless_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    rule = rollouts_table([row()]).splitlines()[1]
    assert len(rule) == 60


@given(st.text(), st.text(), st.text(), st.integers(min_value=45, max_value=200))
def test_no_text_can_make_a_line_wider_than_the_table_or_unprintable(
    prompt: str, response: str, truth: str, width: int
) -> None:
    for line in rollouts_table([row(prompt, response, truth)], width).split("\n"):
        assert columns(line) <= width
        assert line.isprintable()
