"""The fingerprint of a run's rows differs where any of them does."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from megarl.data.fingerprint import fingerprint

ROWS = [((1, 2), "a"), ((3,), "b"), ((), "")]


def test_the_same_rows_have_the_same_fingerprint_with_their_number() -> None:
    assert fingerprint(ROWS) == fingerprint(iter(ROWS))
    assert fingerprint(ROWS).startswith("3 rows with SHA-256 ")


@pytest.mark.parametrize(
    "rows",
    [
        [],
        ROWS[:2],
        ROWS[::-1],
        [((1, 2), "b"), *ROWS[1:]],
        [((1, 3), "a"), *ROWS[1:]],
        [((1,), "a"), ((2, 3), "b"), ((), "")],
        [((1, 2), "ab"), ((3,), ""), ((), "")],
    ],
    ids=str,
)
def test_other_rows_have_another(rows: Sequence[tuple[Sequence[int], str]]) -> None:
    assert fingerprint(rows) != fingerprint(ROWS)
