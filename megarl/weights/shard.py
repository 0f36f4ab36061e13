"""What a rank holds, said in the coordinates of the Hugging Face checkpoint.

Every parameter of a trainer's or an engine's rank is a stack of row ranges of Hugging Face tensors along one dim.
Load, publish and export are then all the same question: which range goes where.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """The range [start, stop) of a Hugging Face tensor along its shard's dim. ``tensor`` None is zero padding."""

    tensor: str | None
    start: int
    stop: int

    @property
    def length(self) -> int:
        """Number of rows."""
        return self.stop - self.start


@dataclass(frozen=True)
class Shard:
    """One parameter on one rank: ``segments`` stacked in order along ``dim`` of a tensor of ``shape``."""

    name: str
    shape: tuple[int, ...]
    dim: int
    segments: tuple[Segment, ...]


def whole(name: str, shape: tuple[int, ...], dim: int) -> Shard:
    """Return the shard that is a whole Hugging Face tensor; ``dim`` is the one that its sources are split along."""
    return Shard(name, shape, dim, (Segment(name, 0, shape[dim]),))


def clip(blocks: list[Segment], start: int, stop: int) -> tuple[Segment, ...]:
    """Cut the window [start, stop) out of the stack of ``blocks``; what lies past its end is padding."""
    out, offset = [], 0
    for block in blocks:
        low, high = max(start, offset), min(stop, offset + block.length)
        if low < high:
            out.append(Segment(block.tensor, block.start + low - offset, block.start + high - offset))
        offset += block.length
    if stop > offset:
        out.append(Segment(None, 0, stop - max(start, offset)))
    return tuple(out)
