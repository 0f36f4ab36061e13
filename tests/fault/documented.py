"""The faults that tests cause, as the list in docs/failures.md: ``python -m tests.fault.documented`` writes it anew."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = REPOSITORY / "docs" / "failures.md"
BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"
MODULES = (
    "tests/fault/test_*.py",
    "tests/security/test_*.py",
    "tests/dist/test_non_finite.py",
    "tests/e2e/test_resume.py",
)


def faults() -> Iterator[tuple[Path, str, list[str]]]:
    """Yield each module of tests with its first line, and its tests as sentences; those that take long in italics."""
    for path in sorted(path for pattern in MODULES for path in REPOSITORY.glob(pattern)):
        module = ast.parse(path.read_text(encoding="utf-8"))
        first = (ast.get_docstring(module) or "").partition("\n")[0]
        tests = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
        yield path.relative_to(REPOSITORY), first, [_sentence(test) for test in tests]


def _sentence(test: ast.FunctionDef) -> str:
    words = test.name.removeprefix("test_").replace("_", " ")
    is_long = any(ast.unparse(decorator) == "pytest.mark.long" for decorator in test.decorator_list)
    return f"*{words}*" if is_long else words


def text() -> str:
    """Return the list as Markdown."""
    lines = []
    for path, first, sentences in faults():
        lines += [f"**{first}** ({path})", "", *(f"- {sentence}" for sentence in sentences), ""]
    return "\n".join(lines)


def with_faults(page: str) -> str:
    """Return a page whose list is that of now."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{text()}{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(with_faults(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
