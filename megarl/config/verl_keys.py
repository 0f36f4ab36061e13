"""verl's keys and ours, read from verl_keys.yaml, which says what its columns mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

KINDS = ("same", "renamed", "converted", "meaning", "none", "missing")
_ANY = ".*"  # at the end of a row's key: a section and all below it


@dataclass(frozen=True)
class Row:
    """What one key of verl's, or a section of them, is here. verl_keys.yaml says what the columns mean."""

    verl: str
    kind: str
    ours: str | None = None
    by: str | None = None
    default: Any = None
    idle: tuple[Any, ...] = ()
    where: str | None = None
    note: str = ""

    def our_key(self, key: str) -> str:
        """Return our key for ``key``, which this row is about."""
        ours = self.ours or self.verl
        return ours.removesuffix(_ANY) + key.removeprefix(self.verl.removesuffix(_ANY)) if ours.endswith(_ANY) else ours


@cache
def verl_rows() -> Mapping[str, Row]:
    """Return every row by verl's key."""
    rows = yaml.safe_load(Path(__file__).with_name("verl_keys.yaml").read_text(encoding="utf-8"))
    return {row["verl"]: Row(**{**row, "idle": tuple(row.get("idle", ()))}) for row in rows}


def verl_row(key: str) -> Row | None:
    """Return the row of a key of verl's: its own, or that of the nearest section around it; else None."""
    rows, section = verl_rows(), key
    if key in rows:
        return rows[key]
    while section:
        if section + _ANY in rows:
            return rows[section + _ANY]
        section = section.rpartition(".")[0]
    return None


def ours_for(key: str, value: object) -> str:
    """Return what to set in place of a key of verl's that is none here, or of the keys in a section; else nothing."""
    return "; ".join(_answers(key, value))


def _answers(key: str, value: object) -> Iterator[str]:
    row = verl_row(key)
    if row is None and isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _answers(f"{key}.{name}", inner)
    elif row is not None and row.our_key(key) != key and row.kind not in ("none", "missing"):
        yield f"verl's {key} is {row.our_key(key)} here{f' ({row.note})' if row.note else ''}"
    elif row is not None and row.kind in ("none", "missing"):
        words = "has no effect here" if row.kind == "none" else "isn't there yet"
        yield f"verl's {key} {words}: {row.note}"
