"""Ranges of a parameter's elements, said in rectangles of Hugging Face tensors.

Optimizers split parameters over data-parallel ranks by elements, in the middle of rows too. Every such range is a few
rectangles, which mean the same on any layout and backend.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from megarl.weights.cells import Span, spans_in_both
from megarl.weights.shard import Shard

_WRITTEN = re.compile(r"(?P<tensor>[^\[\]]+)\[(?P<spans>\d+:\d+(,\d+:\d+)*)\]")


@dataclass(frozen=True, slots=True)
class Rectangle:
    """The range of each dim in ``spans`` of a Hugging Face tensor."""

    tensor: str
    spans: tuple[Span, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Shape of the rectangle."""
        return tuple(stop - start for start, stop in self.spans)

    def __str__(self) -> str:
        """Return ``tensor[0:64,32:64]``."""
        return f"{self.tensor}[{','.join(f'{start}:{stop}' for start, stop in self.spans)}]"

    def overlap(self, other: Rectangle) -> Rectangle | None:
        """Return the Rectangle that is in both, None where there is none."""
        spans = spans_in_both(self.spans, other.spans) if self.tensor == other.tensor else None
        return None if spans is None else Rectangle(self.tensor, spans)

    def part_of(self, values: Tensor, inner: Rectangle) -> Tensor:
        """Return the view of ``inner`` where ``values`` are this rectangle's."""
        return values[self.index(inner)]

    def index(self, inner: Rectangle) -> tuple[slice, ...]:
        """Return the index of ``inner`` in this rectangle's values, as a tuple of slices."""
        return tuple(slice(a - base, b - base) for (a, b), (base, _) in zip(inner.spans, self.spans, strict=True))


def parsed(text: str) -> Rectangle | None:
    """Return the Rectangle that ``str`` wrote, None for anything else."""
    found = _WRITTEN.fullmatch(text)
    if found is None:
        return None
    spans = [span.split(":") for span in found["spans"].split(",")]
    return Rectangle(found["tensor"], tuple((int(start), int(stop)) for start, stop in spans))


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle, and where its elements are among those of a range: ``offset`` of the first, and ``strides``."""

    rectangle: Rectangle
    offset: int
    strides: tuple[int, ...]

    def view(self, elements: Tensor) -> Tensor:
        """Return the rectangle of a range's ``elements``, which are contiguous, as a view."""
        assert elements.is_contiguous()
        return elements.as_strided(self.rectangle.sizes, self.strides, elements.storage_offset() + self.offset)


def pieces_of(shard: Shard, start: int, stop: int) -> Iterator[Piece]:
    """Yield elements [start, stop) of a shard's parameter, counted row by row, as pieces; padding is left out."""
    strides = tuple(math.prod(shard.shape[dim + 1 :]) for dim in range(len(shard.shape)))
    for box in _boxes(shard.shape, start, stop):
        first = 0
        for seg in shard.segments:
            window = tuple(
                (first, first + seg.length) if dim == shard.dim else (0, size) for dim, size in enumerate(shard.shape)
            )
            inside = spans_in_both(box, window)
            if seg.tensor is not None and inside is not None:
                shift = seg.start - first
                spans = tuple(
                    (a + shift, b + shift) if dim == shard.dim else (a, b) for dim, (a, b) in enumerate(inside)
                )
                offset = sum(a * stride for (a, _), stride in zip(inside, strides, strict=True)) - start
                yield Piece(Rectangle(seg.tensor, spans), offset, strides)
            first += seg.length


def _boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[Span, ...]]:
    """Yield the boxes that elements [start, stop) of an array make: part of a row, whole rows, part of a row."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield ((start, stop),)
        return
    row_numel = math.prod(shape[1:])
    first, at = divmod(start, row_numel)
    last, end = divmod(stop, row_numel)
    if at and first < last:
        yield from (((first, first + 1), *rest) for rest in _boxes(shape[1:], at, row_numel))
        first, at = first + 1, 0
    if first < last:
        yield ((first, last), *((0, size) for size in shape[1:]))
        first = last
    if end:
        yield from (((first, first + 1), *rest) for rest in _boxes(shape[1:], at, end))
