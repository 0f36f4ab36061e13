"""The terminal shows what matters and can't be confused by what a model wrote."""

from __future__ import annotations

import io
import math
import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarl.monitor.console import (
    HEADLINE,
    MAX_CELL_LINES,
    TROUBLES,
    Progress,
    RolloutRow,
    StepTable,
    rollouts_table,
)


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


AB = {"a": "alpha", "b": "beta", "absent": "absent"}


def test_a_line_has_the_headline_metrics_in_columns_under_their_titles_and_leaves_out_the_rest() -> None:
    table = StepTable(AB)
    assert (
        table.lines(3, {"other": 7.0, "b": 0.123456, "a": 2.0}) == "  step    alpha     beta\n     3        2   0.1235"
    )
    assert table.lines(4, {"a": -1.0, "b": 1e-5}) == "     4       -1    1e-05"


def test_a_metric_that_a_step_lacks_leaves_its_column_empty_and_a_new_one_brings_a_header() -> None:
    table = StepTable(AB)
    assert table.lines(0, {"b": 1.0}) == "  step     beta\n     0        1"
    assert table.lines(1, {"a": 2.0}) == "  step    alpha     beta\n     1        2"
    assert table.lines(2, {"b": 3.0}) == "     2                 3"


def test_a_header_comes_again_every_twenty_lines() -> None:
    table = StepTable(AB)
    assert [step for step in range(1, 50) if "alpha" in table.lines(step, {"a": 1.0})] == [1, 21, 41]


def test_a_line_shows_a_metric_that_is_not_finite_whatever_its_name() -> None:
    table = StepTable(AB)
    assert table.lines(3, {"a": 1.0, "hidden": math.nan}).splitlines()[1:] == [
        "     3        1",
        " " * 7 + "hidden nan",
    ]


def test_a_line_shows_failures_of_the_reward_where_there_are_any() -> None:
    metrics = {"reward/mean": 0.5, "reward/num_raised": 3.0, "reward/num_timeout": 0.0}
    assert StepTable().lines(3, metrics).splitlines()[1:] == ["     3      0.5", " " * 7 + "reward/num_raised 3"]


@given(
    st.dictionaries(
        st.sampled_from([*HEADLINE, *TROUBLES, *(f"a/metric/of/some/length_{i}" for i in range(9))]),
        st.floats(),
    ),
    st.integers(0, 999_999),
)
def test_no_line_is_wider_than_120_columns_and_columns_never_touch(metrics: dict[str, float], step: int) -> None:
    header, line, *others = StepTable().lines(step, metrics).splitlines()
    assert all(len(text) <= 120 for text in (header, line, *others))
    assert len(line.split()) == len(header.split()) == 1 + sum(name in HEADLINE for name in metrics)


def test_after_a_table_the_header_comes_again() -> None:
    stream = io.StringIO()
    progress = Progress(total_steps=10, stream=stream, headline=AB)
    progress.log(1, {"a": 1.0})
    progress.log(2, {"a": 1.0})
    progress.write("a table")
    progress.log(3, {"a": 1.0})
    progress.close()
    header = "  step    alpha"
    assert stream.getvalue().splitlines() == [
        *(header, "     1        1", "     2        1"),
        *("a table", header, "     3        1"),
    ]


def test_a_log_file_gets_lines_and_no_bar() -> None:
    stream = io.StringIO()
    progress = Progress(total_steps=10, stream=stream, headline=AB)
    progress.wait_for("generate")
    progress.log(1, {"a": 1.0})
    progress.close()
    assert stream.getvalue() == "  step    alpha\n     1        1\n"


def test_a_terminal_gets_a_bar_at_the_step_that_says_what_it_waits_for() -> None:
    stream = Terminal()
    progress = Progress(total_steps=10, stream=stream, headline=AB)
    progress.wait_for("starting 4 ranks")
    progress.log(5, {"a": 1.0})
    progress.wait_for("generate")
    progress.close()
    assert "     5        1\n" in stream.getvalue()
    assert "0/10" in stream.getvalue() and ", starting 4 ranks]" in stream.getvalue()
    assert "5/10" in stream.getvalue() and ", generate]" in stream.getvalue()


def test_what_came_before_the_first_step_does_not_count_in_the_time_that_is_left() -> None:
    stream = Terminal()
    progress = Progress(total_steps=11, stream=stream, headline=AB)
    time.sleep(1.1)
    progress.log(0, {"b": 1.0})
    progress.log(1, {"a": 1.0, "time_s/step": 6.0})
    progress.wait_for("generate")
    progress.close()
    assert "1/11 [00:06<01:00,  6.0" in stream.getvalue()


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
    rule = rollouts_table([row(response="word " * 20)]).splitlines()[1]
    assert len(rule) == 60


def test_a_table_of_short_texts_is_no_wider_than_they_are() -> None:
    assert rollouts_table([row()], width=200).splitlines()[1] == "------+---------+----------+------"


def test_a_word_problem_and_its_answer_are_shown_whole_at_120_columns() -> None:
    prompt, response = ("<|user|>" + "word " * 70 + "<|end|>"), "step " * 80 + "#### 18"
    table = rollouts_table([row(prompt, response, "18", 0.2)], width=120)
    assert table.count("word") == 70 and table.count("step") == 80


@given(st.text(), st.text(), st.text(), st.integers(min_value=45, max_value=200))
def test_no_text_can_make_a_line_wider_than_the_table_or_unprintable(
    prompt: str, response: str, truth: str, width: int
) -> None:
    for line in rollouts_table([row(prompt, response, truth)], width).split("\n"):
        assert columns(line) <= width
        assert line.isprintable()
