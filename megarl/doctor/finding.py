"""What the doctor says of one thing it looked at, and how all of it is printed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

Level = Literal["ok", "warn", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    level: FAIL where a run would not start or would go wrong, warn where it may or is slower. fix: empty where ok.
    """

    level: Level
    name: str
    found: str
    fix: str = ""


def ok(name: str, found: str) -> Finding:
    """Return a finding that asks for nothing."""
    return Finding("ok", name, found)


def exit_code(findings: Sequence[Finding]) -> int:
    """Return 1 where anything failed, else 0."""
    return int(any(finding.level == "FAIL" for finding in findings))


def as_text(findings: Sequence[Finding]) -> str:
    """Return a line for each finding, with its fix on the next, and a line that counts them."""
    width = max((len(finding.name) for finding in findings), default=0)
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:<4}  {finding.name:<{width}}  {finding.found}")
        if finding.fix:
            lines.append(f"      {'':<{width}}  fix: {finding.fix}")
    count = {level: sum(finding.level == level for finding in findings) for level in ("ok", "warn", "FAIL")}
    return "\n".join([*lines, "", ", ".join(f"{number} {level}" for level, number in count.items())])


def as_json(findings: Sequence[Finding]) -> str:
    """Return the findings as a JSON list of objects with the fields of Finding."""
    return json.dumps([asdict(finding) for finding in findings], indent=2)


def gibibytes(num_bytes: float) -> str:
    """Return bytes as a person reads them: ``1.5 GiB``, or MiB below one."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"
