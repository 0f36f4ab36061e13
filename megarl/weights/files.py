"""Which tensors of a checkpoint go into which file."""

from __future__ import annotations

import math
from collections.abc import Mapping

Shapes = Mapping[str, tuple[int, ...]]

MAX_FILE_BYTES = 4 << 30


def plan_files(shapes: Shapes, itemsize: int, max_bytes: int = MAX_FILE_BYTES) -> tuple[tuple[str, ...], ...]:
    """Cut the tensors, in order, into files of at most ``max_bytes`` (a larger tensor has a file of its own)."""
    files: list[list[str]] = []
    filled = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * itemsize
        if not files or filled + size > max_bytes:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += size
    return tuple(tuple(names) for names in files)
