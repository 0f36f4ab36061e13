"""Puts what a benchmark measured into docs/performance.md, between marks that name it."""

from __future__ import annotations

from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"


def write_measured(name: str, text: str) -> None:
    """Replace what the page says was measured of ``name``. Raises ValueError where the page has no such marks."""
    begin, end = (f"<!-- measured {name}: {mark} -->" for mark in ("begin", "end"))
    before, rest = PAGE.read_text(encoding="utf-8").split(begin)
    _, after = rest.split(end)
    PAGE.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
