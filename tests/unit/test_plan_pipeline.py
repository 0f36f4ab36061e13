from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.parallel.layout import Layout
from megarl.plan.pipeline import ChunkPass, Moment, chunk_passes, moments


@st.composite
def pipelines(draw: st.DrawFn) -> Layout:
    """Draw a pipeline of up to 6 stages with up to 4 chunks each."""
    pp = draw(st.integers(1, 6))
    return Layout(pp, pp=pp, vpp=draw(st.integers(1, 4)) if pp > 1 else 1)


def _num_run(layout: Layout, num_micro_batches: int) -> int:
    """Return how many micro-batches run, those without rows included."""
    return num_micro_batches + (-num_micro_batches % layout.pp if layout.vpp > 1 else 0)


def _most_held(layout: Layout, stage: int, num_micro_batches: int) -> int:
    return max(sum(moment.num_held) for moment in moments(layout, stage, num_micro_batches))


@settings(max_examples=300)
@given(pipelines(), st.integers(1, 20), st.data())
def test_every_micro_batch_passes_every_chunk_forward_and_then_backward_in_order(
    layout: Layout, micro: int, data: st.DataObject
) -> None:
    passes = list(chunk_passes(layout, data.draw(st.integers(0, layout.pp - 1)), micro))
    run = range(_num_run(layout, micro))
    assert sorted((p.chunk, p.micro_batch, p.is_forward) for p in passes) == list(
        product(range(layout.vpp), run, [False, True])
    )
    for chunk, is_forward in product(range(layout.vpp), [True, False]):
        assert [p.micro_batch for p in passes if (p.chunk, p.is_forward) == (chunk, is_forward)] == list(run)
    for backward in (p for p in passes if not p.is_forward):
        forward = ChunkPass(backward.chunk, backward.micro_batch, is_forward=True)
        assert passes.index(forward) < passes.index(backward)


@settings(max_examples=200, deadline=None)
@given(pipelines(), st.integers(1, 12))
def test_no_stage_waits_for_ever_for_another(layout: Layout, micro: int) -> None:
    """A stage runs its next pass as soon as the pass of the neighbouring piece of the model that it needs is done."""
    waiting = [list(chunk_passes(layout, stage, micro)) for stage in range(layout.pp)]
    done: set[tuple[int, int, bool]] = set()
    last = layout.pp * layout.vpp - 1
    while any(waiting):
        before = len(done)
        for stage, passes in enumerate(waiting):
            while passes:
                p, place = passes[0], passes[0].chunk * layout.pp + stage
                needed = (place - 1, p.micro_batch, True) if p.is_forward else (place + 1, p.micro_batch, False)
                if needed not in done and place != (0 if p.is_forward else last):
                    break
                done.add((place, p.micro_batch, p.is_forward))
                passes.pop(0)
        assert len(done) > before


@given(st.integers(1, 8), st.integers(1, 20))
def test_1f1b_keeps_a_micro_batch_for_every_stage_from_it_to_the_last(pp: int, micro: int) -> None:
    for stage in range(pp):
        assert _most_held(Layout(pp, pp=pp), stage, micro) == min(micro, pp - stage)


@given(st.integers(2, 6), st.integers(2, 4), st.integers(1, 4))
def test_interleaved_stages_keep_the_passes_that_are_ahead_and_one_more(pp: int, vpp: int, groups: int) -> None:
    for stage in range(pp):
        ahead = 2 * (pp - stage - 1) + (vpp - 1) * pp
        assert _most_held(Layout(pp, pp=pp, vpp=vpp), stage, groups * pp) == min(groups * pp * vpp, ahead + 1)


@settings(max_examples=300)
@given(pipelines(), st.integers(1, 30))
def test_earlier_stages_and_more_micro_batches_never_keep_less_and_never_more_than_all(
    layout: Layout, micro: int
) -> None:
    held = [_most_held(layout, stage, micro) for stage in range(layout.pp)]
    assert held == sorted(held, reverse=True)
    assert all(1 <= n <= micro * layout.vpp for n in held)
    assert all(n <= _most_held(layout, stage, micro + 1) for stage, n in enumerate(held))


@settings(max_examples=300, deadline=None)
@given(pipelines(), st.integers(1, 60), st.data())
def test_the_fullest_moment_is_that_of_the_whole_schedule_whatever_chunks_keep(
    layout: Layout, micro: int, data: st.DataObject
) -> None:
    stage = data.draw(st.integers(0, layout.pp - 1))
    sizes = data.draw(st.lists(st.integers(1, 100), min_size=layout.vpp, max_size=layout.vpp))
    more = data.draw(st.lists(st.integers(0, 100), min_size=layout.vpp, max_size=layout.vpp))
    kept = most = 0
    for p in chunk_passes(layout, stage, micro):
        if p.micro_batch < micro:
            most = max(most, kept + (0 if p.is_forward else more[p.chunk]))
            kept += sizes[p.chunk] if p.is_forward else -sizes[p.chunk]
    assert kept == 0
    assert max(m.bytes_of(sizes) + more[m.chunk] for m in moments(layout, stage, micro)) == most


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (0, [Moment((2, 2), 1), Moment((2, 1), 1), Moment((2, 0), 0), Moment((1, 0), 0)]),
        (1, [Moment((2, 1), 1), Moment((2, 0), 0), Moment((1, 0), 0)]),
    ],
)
def test_two_micro_batches_on_two_stages_of_two_chunks(stage: int, expected: list[Moment]) -> None:
    assert set(moments(Layout(2, pp=2, vpp=2), stage, 2)) == set(expected)
