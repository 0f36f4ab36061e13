"""docs/failures.md lists the faults that tests cause, as they are now."""

from __future__ import annotations

from tests.fault.documented import BEGIN, END, PAGE, faults, with_faults


def test_the_list_of_faults_is_that_of_the_tests() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert BEGIN in page and END in page
    assert page == with_faults(page), "python -m tests.fault.documented writes it anew"


def test_every_module_has_a_first_line_and_tests() -> None:
    found = list(faults())
    assert len(found) > 5 and all(first.endswith((".", ":")) and sentences for _, first, sentences in found)
