from __future__ import annotations

import time
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarl.reward.math import (
    last_number,
    marked_number,
    score_exact_match,
    score_number,
    score_single_mark,
    to_number,
)

NUMBERS = st.decimals(-(10**12), 10**12, places=2, allow_nan=False, allow_infinity=False)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 72", "72"),
        ("He has 3.\n#### 72\n", "72"),
        ("#### -7", "-7"),
        ("#### $1,080", "1080"),
        ("#### -$5", "-5"),
        ("#### $-5", "-5"),
        ("#### 18.50", "18.5"),
        ("#### .5", "0.5"),
        ("#### 12.", "12"),
        ("#### 12. That is all.", "12"),
        ("#### 12 dollars", "12"),
        ("#### 50%", "50"),
        ("**#### 12**", "12"),
        ("####12", "12"),
        ("#### 3 #### 4", "4"),
        ("#### 5 6 7", "5"),
        ("#### 1,000,000", "1000000"),
        ("#### 007", "7"),
    ],
)
def test_the_number_after_the_last_mark_is_the_answer(text: str, number: str) -> None:
    assert marked_number(text) == Decimal(number)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "72",
        "### 72",
        "####",
        "#### ",
        "#### seventy-two",
        "#### 72 ####",
        "####\n72",
        "#### x = 72",
        "#### 1,2",
        "#### 1,0000",
        "#### 1.2.3",
        "#### 3/4",
        "#### 3e5",
        "#### 6*2",
        "#### 2**5",
        "#### 12-15",
        "#### 12:30",
        "#### 7th",
        "#### 72apples",
        "#### --5",
        "#### \u0667\u0662",
        "#### 1\u0662",
        "#### inf",
        "#### nan",
        "#### 0x48",
    ],
)
def test_what_is_no_single_number_is_no_answer(text: str) -> None:
    assert marked_number(text) is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 72.", "72"),
        ("#### 3, no, 4", "4"),
        ("10-3=7", "7"),
        ("it is -7 degrees", "-7"),
        ("10-3", "3"),
        ("it costs $1,080.50!", "1080.50"),
        ("a loss of -$20", "-20"),
        ("(5)-4", "4"),
        ("1,2", "2"),
    ],
)
def test_the_last_number_anywhere_is_found(text: str, number: str) -> None:
    assert last_number(text) == Decimal(number)


def test_a_text_without_numbers_has_no_last_number() -> None:
    assert last_number("none - . , $ ####") is None


@given(number=NUMBERS, prefix=st.text(), suffix=st.sampled_from(["", ".", "\n", " apples", "\n\nDone."]))
def test_a_number_is_read_back_however_it_is_written(number: Decimal, prefix: str, suffix: str) -> None:
    for written in (f"{number}", f"{number:,}", f"${number}".replace("$-", "-$")):
        assert marked_number(f"{prefix}#### {written}{suffix}") == number
        assert to_number(written) == number
    assert last_number(f"{prefix} {number:,}{suffix}") == number


@given(text=st.text(alphabet="0123456789#,.-$ /x\n"))
def test_no_text_breaks_the_parser_or_scores_without_a_mark(text: str) -> None:
    marked = marked_number(text)
    assert marked is None or "####" in text
    assert (last_number(text) is None) == (not any(character.isdigit() for character in text))


@pytest.mark.parametrize(
    "text",
    ["#### " + "1" * 10**5 + "a", "#### " + "1,234" * 10**5, "," + "123," * 10**5, "#### " + "-$" * 10**5 + "1x"],
)
def test_a_long_run_of_digits_is_read_in_linear_time(text: str) -> None:
    start = time.perf_counter()
    marked_number(text)
    last_number(text)
    assert time.perf_counter() - start < 2.0


def test_equal_values_score_however_they_are_written() -> None:
    assert score_number(Decimal("18.00"), "18") == 1.0
    assert score_number(Decimal("1080"), "1,080") == 1.0
    assert score_number(Decimal("18.01"), "18") == 0.0
    assert score_number(None, "18") == 0.0


@pytest.mark.parametrize("ground_truth", ["", "eighteen", "1 8", "--18", "nan"])
def test_a_ground_truth_that_is_no_number_is_an_error(ground_truth: str) -> None:
    with pytest.raises(ValueError, match="is not a number"):
        score_number(None, ground_truth)


def test_an_exact_match_forgives_only_white_space_around_it() -> None:
    assert score_exact_match(" Paris\n", "Paris") == 1.0
    assert [score_exact_match(text, "Paris") for text in ("paris", "Paris.", "Par is", "")] == [0.0] * 4


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("8 - 3 = 5 #### 5", 1.0),
        ("####5", 1.0),
        ("8 + 3 = 11 #### 11", 0.0),
        ("8 - 3 = 5", 0.0),
        ("5", 0.0),
        ("#### 5 #### 5", 0.0),
        ("#### 5 5", 0.0),
        ("#### 5 apples", 0.0),
        ("####", 0.0),
        ("#### 05", 0.0),
        ("######## 5", 0.0),
    ],
)
def test_a_single_mark_has_to_precede_the_answer_and_nothing_else(text: str, score: float) -> None:
    assert score_single_mark(text, "5") == score
