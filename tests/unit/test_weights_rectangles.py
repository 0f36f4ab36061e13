"""Ranges of a parameter as rectangles of Hugging Face tensors."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

from megarl.weights.rectangles import Rectangle, parsed, pieces_of
from megarl.weights.shard import Segment, Shard, whole


def test_a_range_within_rows_is_part_of_a_row_whole_rows_and_part_of_a_row() -> None:
    spans = [piece.rectangle.spans for piece in pieces_of(whole("w", (4, 3)), 2, 10)]
    assert spans == [((0, 1), (2, 3)), ((1, 3), (0, 3)), ((3, 4), (0, 1))]


def test_a_range_inside_one_row_is_one_rectangle() -> None:
    assert [p.rectangle.spans for p in pieces_of(whole("w", (4, 5)), 6, 9)] == [((1, 2), (1, 4))]
    assert [p.rectangle.spans for p in pieces_of(whole("w", (7,)), 2, 7)] == [((2, 7),)]
    assert [p.rectangle.spans for p in pieces_of(whole("w", (4, 5)), 5, 15)] == [((1, 3), (0, 5))]
    assert list(pieces_of(whole("w", (4, 5)), 8, 8)) == []


def test_padding_is_in_no_piece_and_segments_keep_their_own_rows() -> None:
    shard = Shard("w", (6, 2), 0, (Segment("a", 4, 6), Segment(None, 0, 1), Segment("b", 0, 3)))
    found = [str(piece.rectangle) for piece in pieces_of(shard, 0, 12)]
    assert found == ["a[4:6,0:2]", "b[0:3,0:2]"]


@pytest.mark.parametrize("seed", range(200))
def test_ranges_of_any_cut_fill_every_element_of_the_tensors_once(seed: int) -> None:
    draw = random.Random(seed)
    shape = tuple(draw.randint(1, 5) for _ in range(draw.randint(1, 3)))
    dim = draw.randrange(len(shape))
    cuts = sorted({0, shape[dim], *(draw.randint(0, shape[dim]) for _ in range(2))})
    names = [draw.choice(("a", "b", None)) if i else "a" for i in range(len(cuts) - 1)]
    segments = tuple(Segment(name, start, stop) for name, start, stop in zip(names, cuts[:-1], cuts[1:], strict=True))
    shard = Shard("w", shape, dim, segments)
    parameter = torch.randn(shape)
    tensors = {name: torch.full(shape, torch.nan) for name in ("a", "b")}
    elements = parameter.flatten()
    ends = sorted({0, len(elements), *(draw.randint(0, len(elements)) for _ in range(3))})
    for start, stop in pairwise(ends):
        for piece in pieces_of(shard, start, stop):
            rectangle = piece.rectangle
            there = Rectangle(rectangle.tensor, tuple((0, size) for size in shape))
            target = there.part_of(tensors[rectangle.tensor], rectangle)
            assert target.isnan().all()  # no element twice
            target.copy_(piece.view(elements[start:stop]))
    for seg in segments:
        if seg.tensor is not None:
            rows = slice(seg.start, seg.stop)
            index = tuple(rows if d == dim else slice(None) for d in range(len(shape)))
            assert torch.equal(tensors[seg.tensor][index], parameter[index])


def test_a_rectangle_reads_back_what_it_writes_and_nothing_else() -> None:
    rectangle = Rectangle("model.layers.0.mlp.weight", ((0, 64), (3, 7)))
    assert parsed(str(rectangle)) == rectangle
    assert [parsed(text) for text in ("w", "w[]", "w[0:1", "w[0:1,]", "[0:1]", "w[a:1]")] == [None] * 6


def test_rectangles_overlap_where_both_have_elements() -> None:
    one, other = Rectangle("w", ((0, 4), (0, 2))), Rectangle("w", ((2, 6), (1, 5)))
    assert one.overlap(other) == Rectangle("w", ((2, 4), (1, 2)))
    assert one.overlap(Rectangle("w", ((4, 6), (0, 2)))) is None
    assert one.overlap(Rectangle("v", one.spans)) is None
