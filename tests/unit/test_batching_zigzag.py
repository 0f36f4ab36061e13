from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from megarl.batching.zigzag import gathered_positions, held_positions, num_parts


@st.composite
def splits(draw: st.DrawFn) -> tuple[int, list[int]]:
    """Draw a number of context ranks, and lengths that can be split over them."""
    cp = draw(st.integers(1, 6))
    return cp, [num_parts(cp) * n for n in draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))]


def test_each_of_two_ranks_holds_the_outer_or_the_inner_parts_of_every_sequence() -> None:
    assert held_positions([8, 4], 2, 0).tolist() == [0, 1, 6, 7, 8, 11]
    assert held_positions([8, 4], 2, 1).tolist() == [2, 3, 4, 5, 9, 10]
    assert held_positions([3, 2], 1, 0).tolist() == [0, 1, 2, 3, 4]


@given(splits())
def test_gathered_tokens_are_found_where_they_are_said_to_be(split: tuple[int, list[int]]) -> None:
    cp, lengths = split
    gathered_T = torch.cat([held_positions(lengths, cp, rank) for rank in range(cp)])
    assert gathered_T[gathered_positions(lengths, cp)].tolist() == list(range(sum(lengths)))


@given(splits())
def test_causal_attention_gives_all_ranks_the_same_work(split: tuple[int, list[int]]) -> None:
    cp, lengths = split
    position_T = torch.cat([torch.arange(length) for length in lengths])
    work = {int((position_T[held_positions(lengths, cp, rank)] + 1).sum()) for rank in range(cp)}
    assert len(work) == 1
