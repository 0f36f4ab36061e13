"""What a run left in its folder, as tests compare two runs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """Return the metrics of each step to the bit, without what depends on the clock."""
    return [
        {
            k: v.hex() if isinstance(v, float) else v
            for k, v in json.loads(line).items()
            if not k.startswith(("time_s", "wall_"))
        }
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def close_to(folder: Path, expected: Path) -> None:
    """Compare the metrics of two runs, to what another order of additions does to them."""
    found, wanted = (
        [{k: float.fromhex(v) if isinstance(v, str) else v for k, v in line.items()} for line in lines_of(f)]
        for f in (folder, expected)
    )
    assert len(found) == len(wanted) > 0
    for line, other in zip(found, wanted, strict=True):
        assert line == pytest.approx(other, rel=1e-5, abs=1e-5)


def hashes(checkpoint: Path) -> dict[str, str]:
    """Return the hash of every file that has weights or moments."""
    return {
        str(path.relative_to(checkpoint)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(checkpoint.rglob("*.safetensors"))
        if not path.name.startswith("random-")
    }
