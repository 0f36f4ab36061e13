from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from megarl.errors import PublishError
from megarl.parallel.layout import Layout
from megarl.weights.model_shape import ModelShape
from megarl.weights.name_map import hf_shapes, megatron_shards, vllm_shards
from megarl.weights.reshard_plan import Move, Piece, cut_into_buckets, plan_reshard
from megarl.weights.shard import Segment, Shard, whole
from tests.unit.model_shapes import layouts_of, model_shape, model_shapes

Ints = NDArray[np.int64]
Tensors = dict[str, Ints]
Ranks = Sequence[Sequence[Shard]]

UNTOUCHED = -1  # what a target holds where no move writes


def _contents(shapes: dict[str, tuple[int, ...]]) -> Tensors:
    """Return whole tensors in which every element of the model has a number of its own."""
    tensors, first = {}, 0
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        tensors[name] = np.arange(first, first + size).reshape(shape)
        first += size
    return tensors


def _held(shards: Sequence[Shard], full: Tensors) -> Tensors:
    """Return what a rank with these shards holds of the whole tensors."""
    held = {}
    for shard in shards:
        held[shard.name] = np.concatenate([_segment(s, shard, full) for s in shard.segments], shard.dim)
        assert held[shard.name].shape == shard.shape
    return held


def _segment(segment: Segment, shard: Shard, full: Tensors) -> Ints:
    if segment.tensor is None:
        return np.full([*shard.shape[: shard.dim], segment.length, *shard.shape[shard.dim + 1 :]], UNTOUCHED)
    rows = slice(segment.start, segment.stop)
    return full[segment.tensor][rows] if shard.dim == 0 else full[segment.tensor][:, rows]


def _rows(tensor: Ints, piece: Piece, length: int) -> Ints:
    rows = slice(piece.offset, piece.offset + length)
    return tensor[rows] if piece.dim == 0 else tensor[:, rows]


def _execute(moves: Sequence[Move], sources: Ranks, targets: Ranks, full: Tensors) -> list[Tensors]:
    """Carry out a plan on numpy arrays; every element is written once at most."""
    held = [_held(shards, full) for shards in sources]
    filled = [{s.name: np.full(s.shape, UNTOUCHED) for s in shards} for shards in targets]
    for move in moves:
        rows = _rows(held[move.source.rank][move.source.name], move.source, move.length)
        place = _rows(filled[move.target.rank][move.target.name], move.target, move.length)
        assert rows.size == move.numel > 0 and (place == UNTOUCHED).all()
        place[:] = rows
    return filled


def _assert_filled(moves: Sequence[Move], sources: Ranks, targets: Ranks, full: Tensors) -> None:
    for shards, filled in zip(targets, _execute(moves, sources, targets, full), strict=True):
        for name, expected in _held(shards, full).items():
            np.testing.assert_array_equal(filled[name], expected, err_msg=name)


def _trainer(shape: ModelShape, layout: Layout) -> Ranks:
    return [megatron_shards(shape, layout, rank) for rank in range(layout.world_size)]


def _engine(shape: ModelShape, num_ranks: int, tp: int) -> Ranks:
    return [vllm_shards(shape, tp, rank % tp) for rank in range(num_ranks)]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_publishing_from_any_layout_fills_every_engine_with_the_checkpoints_content(data: st.DataObject) -> None:
    shape = data.draw(model_shapes())
    layout = data.draw(layouts_of(shape))
    sources, full = _trainer(shape, layout), _contents(hf_shapes(shape))
    for engine_tp in (1, 2, 4):
        if layout.world_size % engine_tp == 0:
            targets = _engine(shape, layout.world_size, engine_tp)
            _assert_filled(plan_reshard(sources, targets), sources, targets, full)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_exporting_from_any_layout_gives_every_tensor_of_the_checkpoint_whole(data: st.DataObject) -> None:
    shape = data.draw(model_shapes())
    layout = data.draw(layouts_of(shape))
    sources, shapes = _trainer(shape, layout), hf_shapes(shape)
    dims = {s.tensor: shard.dim for shards in sources for shard in shards for s in shard.segments}
    targets: list[list[Shard]] = [[] for _ in range(layout.world_size)]
    for i, (name, size) in enumerate(shapes.items()):
        targets[i % layout.world_size].append(whole(name, size, dims[name]))
    full = _contents(shapes)
    filled = _execute(plan_reshard(sources, targets), sources, targets, full)
    gathered = {name: tensor for rank in filled for name, tensor in rank.items()}
    assert gathered.keys() == full.keys()
    for name, tensor in full.items():
        np.testing.assert_array_equal(gathered[name], tensor, err_msg=name)


NUM_ROWS = 12


@st.composite
def windows(draw: st.DrawFn, rank: int) -> Shard:
    """Draw a shard of some rows of the one tensor ``t``, on either side of some padding."""
    start = draw(st.integers(0, NUM_ROWS - 1))
    stop = draw(st.integers(start + 1, NUM_ROWS))
    padding, first = draw(st.integers(0, 2)), draw(st.booleans())
    segments = [Segment("t", start, stop), *([Segment(None, 0, padding)] if padding else [])]
    rows = stop - start + padding
    return Shard(f"w{rank}", (rows, 3), 0, tuple(segments if first else reversed(segments)))


@st.composite
def scattered(draw: st.DrawFn) -> tuple[Ranks, Ranks]:
    """Draw ranks that hold and need arbitrary windows, overlapping and incomplete ones too."""
    num_ranks = draw(st.integers(1, 5))
    sources = [[draw(windows(rank))] if draw(st.booleans()) else [] for rank in range(num_ranks)]
    return sources, [[draw(windows(rank))] for rank in range(num_ranks)]


def _rows_of(shards: Sequence[Shard]) -> set[int]:
    return {row for shard in shards for s in shard.segments if s.tensor is not None for row in range(s.start, s.stop)}


@settings(max_examples=1000, deadline=None)
@given(scattered())
def test_windows_of_any_kind_are_filled_or_their_first_missing_row_is_named(ranks: tuple[Ranks, Ranks]) -> None:
    sources, targets = ranks
    somewhere = {row for shards in sources for row in _rows_of(shards)}
    missing = [(rank, min(lost)) for rank, shards in enumerate(targets) if (lost := _rows_of(shards) - somewhere)]
    if not missing:
        _assert_filled(plan_reshard(sources, targets), sources, targets, _contents({"t": (NUM_ROWS, 3)}))
        return
    rank, row = missing[0]
    with pytest.raises(PublishError, match=rf"no rank holds row {row} of t, needed by w{rank} on rank {rank}$"):
        plan_reshard(sources, targets)


@settings(max_examples=500, deadline=None)
@given(scattered())
def test_rows_that_a_rank_holds_itself_never_travel(ranks: tuple[Ranks, Ranks]) -> None:
    sources, targets = ranks
    everything = [whole("t", (NUM_ROWS, 3), 0)]
    moves = plan_reshard([*sources, everything], [*targets, []])
    for rank, shards in enumerate(targets):
        own = sum(m.length for m in moves if m.source.rank == m.target.rank == rank)
        assert own == len(_rows_of(sources[rank]) & _rows_of(shards))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.sampled_from([1, 2, 4]))
def test_replicas_that_hold_the_same_share_the_sending(num_holders: int, num_others: int, tp: int) -> None:
    shape = model_shape()
    holders = [megatron_shards(shape, Layout(1), 0) for _ in range(num_holders)]
    sources = [*holders, *([()] * num_others)]
    targets = [*([()] * num_holders), *_engine(shape, num_others, tp)]
    moves = plan_reshard(sources, targets)
    sent = Counter(dict.fromkeys(range(num_holders), 0))
    for move in moves:
        sent[move.source.rank] += move.numel
    assert max(sent.values()) - min(sent.values()) <= max(move.numel for move in moves)


def test_a_tensor_that_no_stage_holds_is_an_error_that_names_it() -> None:
    shape, layout = model_shape(), Layout(4, tp=2, pp=2)
    last_stage_alone = [shards if rank >= 2 else () for rank, shards in enumerate(_trainer(shape, layout))]
    with pytest.raises(PublishError, match=r"no rank holds row 0 of model\.embed_tokens\.weight, needed by"):
        plan_reshard(last_stage_alone, _engine(shape, 4, 2))


def _plan(seed: int) -> list[Move]:
    """Return up to 30 moves between four ranks, each with rows of its own width."""
    rng = Random(seed)
    moves = []
    for i in range(rng.randint(0, 30)):
        source, target = (Piece(rank, f"{i}", 0, rng.randint(0, 9)) for rank in rng.sample(range(4), 2))
        length = rng.randint(1, 9)
        moves.append(Move(source, target, length, length * rng.randint(1, 9)))
    return moves


def _row_pairs(moves: Sequence[Move]) -> list[tuple[int, int, int, int, str, int]]:
    """Return where each row comes from and goes to, in order."""
    return [
        (m.source.rank, m.source.offset + i, m.target.rank, m.target.offset + i, m.source.name, m.numel // m.length)
        for m in moves
        for i in range(m.length)
    ]


@settings(max_examples=1000, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(1, 100))
def test_buckets_carry_every_row_once_in_order_and_no_rank_has_more_in_one_than_allowed(seed: int, most: int) -> None:
    moves = _plan(seed)
    buckets = cut_into_buckets(moves, max_numel=most)
    assert _row_pairs([move for bucket in buckets for move in bucket]) == _row_pairs(moves)
    widest = max((m.numel // m.length for m in moves), default=0)  # a row is never cut
    for bucket in buckets:
        load: Counter[tuple[str, int]] = Counter()
        for move in bucket:
            load["send", move.source.rank] += move.numel
            load["receive", move.target.rank] += move.numel
        assert 0 < max(load.values()) <= max(most, widest)


def test_a_plan_that_fits_is_one_bucket_and_keeps_its_moves() -> None:
    shape = model_shape()
    moves = plan_reshard(_trainer(shape, Layout(4, tp=2, pp=2)), _engine(shape, 4, 4))
    travelling = [m for m in moves if m.source.rank != m.target.rank]
    assert cut_into_buckets(travelling, max_numel=1 << 20) == [travelling]
