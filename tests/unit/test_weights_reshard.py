from __future__ import annotations

import math
import time
import tracemalloc
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from megarl.errors import PublishError
from megarl.parallel.layout import EngineLayout, Layout
from megarl.weights.cells import Window, cells_of
from megarl.weights.flow import Rows
from megarl.weights.model_facts.shipped import shipped_config
from megarl.weights.model_shape import ModelShape, parse_model_shape
from megarl.weights.name_map import entries, hf_shapes, megatron_peers, megatron_shards, vllm_peers, vllm_shards
from megarl.weights.reshard_plan import BUCKET_BYTES, RankPlan, asked_of, loads_of, plan_reshard
from megarl.weights.shard import Pattern, Peers, Segment, Shard, alike, peers_of, whole
from tests.unit.model_shapes import engines_of, layouts_of, model_shape, model_shapes

Ints = NDArray[np.int64]
Tensors = dict[str, Ints]
Ranks = Sequence[Sequence[Shard]]

UNTOUCHED = -1  # what a target holds where nothing was written


@dataclass(frozen=True)
class Case:
    """A model's tensors, what ranks hold of them before and after, shard by shard, and the same as peers."""

    shapes: Mapping[str, tuple[int, ...]]
    before: Ranks
    after: Ranks
    sources: tuple[Peers, ...]
    targets: tuple[Peers, ...]
    ranks_per_node: int

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.before)

    def plans(self) -> list[RankPlan]:
        """Return the plan of every rank."""
        held = cells_of(self.sources, self.ranks_per_node)
        return [plan_reshard(held, self.targets, rank) for rank in range(self.world_size)]


def case_of(shapes: Mapping[str, tuple[int, ...]], before: Ranks, after: Ranks, ranks_per_node: int) -> Case:
    """Return the case of arbitrary shards; both ends are lengthened to the same number of ranks."""
    size = max(len(before), len(after))
    before, after = ([*shards, *([()] * (size - len(shards)))] for shards in (before, after))
    return Case(shapes, before, after, peers_of(before), peers_of(after), ranks_per_node)


def publication(
    shape: ModelShape, layout: Layout, engine: EngineLayout, engine_ranks: Sequence[int], ranks_per_node: int
) -> Case:
    """Return the case of a trainer on the first ranks that publishes to engines on ``engine_ranks``."""
    size = max(layout.world_size, *(rank + 1 for rank in engine_ranks))
    before = [megatron_shards(shape, layout, r) if r < layout.world_size else () for r in range(size)]
    tp_rank = {rank: i % engine.tp for i, rank in enumerate(engine_ranks)}
    after = [vllm_shards(shape, engine, tp_rank[r]) if r in tp_rank else () for r in range(size)]
    peers = megatron_peers(shape, layout), vllm_peers(shape, engine, engine_ranks)
    return Case(hf_shapes(shape), before, after, *peers, ranks_per_node)


def _contents(shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
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


def _view(rows: Rows, window: Window | None, held: Tensors) -> Ints:
    assert window is not None
    starts = (window.starts[0] + rows.first_row, *window.starts[1:])
    index = tuple(slice(start, start + size) for start, size in zip(starts, rows.sizes, strict=True))
    return held[window.name.format(i=rows.layer, e=rows.expert)][index]


def _place(rows: Rows) -> tuple[object, ...]:
    """Return all that sender and receiver must agree on."""
    return rows.move.box, rows.move.target, rows.layer, rows.expert, rows.first_row, rows.num_rows


class World:
    """All ranks of a case, and who holds each element. Counts what each rank keeps and receives, element by element."""

    def __init__(self, case: Case, plans: Sequence[RankPlan], bucket_numel: int) -> None:
        self.case, self.plans, self.bucket_numel = case, plans, bucket_numel
        self.full = _contents(case.shapes)
        self.held = [_held(shards, self.full) for shards in case.before]
        self.filled = [{s.name: np.full(s.shape, UNTOUCHED) for s in shards} for shards in case.after]
        self.holders = np.zeros(sum(t.size for t in self.full.values()), dtype=object)  # a bit for each rank
        for rank, tensors in enumerate(self.held):
            for tensor in tensors.values():
                numbers = np.unique(tensor[tensor != UNTOUCHED])
                self.holders[numbers] |= 1 << rank
        self.counted: Counter[tuple[str, int]] = Counter()

    def run(self) -> None:
        """Carry out all plans together, and check every rule on the way."""
        for rank, plan in enumerate(self.plans):
            for flow in plan.kept:
                for rows in flow.rows(0, flow.numel):
                    self._write(rank, rows, _view(rows, rows.move.source, self.held[rank]))
                    self.counted["kept", rank] += rows.numel
        (count,) = {plan.num_exchanges(self.bucket_numel) for plan in self.plans}
        for sender, plan in enumerate(self.plans):
            for target, stream in plan.sends.items():
                assert stream.numel == self.plans[target].receives[sender].numel > 0
            assert sorted(plan.receives) == [r for r, other in enumerate(self.plans) if sender in other.sends]
        for index in range(count):
            self._exchange(index, count)

    def _exchange(self, index: int, count: int) -> None:
        for sender, plan in enumerate(self.plans):
            for target, stream in plan.sends.items():
                there = self.plans[target].receives[sender]
                start, stop = stream.cut(index, count), stream.cut(index + 1, count)
                assert (start, stop) == (there.cut(index, count), there.cut(index + 1, count))
                for out, into in zip(stream.rows(start, stop), there.rows(start, stop), strict=True):
                    assert _place(out) == _place(into) and out.numel > 0
                    values = _view(out, out.move.source, self.held[sender])
                    self._write(target, into, values)
                    self._count(sender, target, values)
        for plan in self.plans:
            for streams in (plan.sends, plan.receives):
                carried = sum(s.cut(index + 1, count) - s.cut(index, count) for s in streams.values())
                assert carried <= self.bucket_numel + sum(1 + s.widest_row for s in streams.values())

    def _write(self, rank: int, rows: Rows, values: Ints) -> None:
        place = _view(rows, rows.move.target, self.filled[rank])
        assert values.size == place.size == rows.numel and (place == UNTOUCHED).all()
        place[:] = values

    def _count(self, sender: int, target: int, values: Ints) -> None:
        """A rank never receives what it holds itself, nor from another node what its own node has."""
        per_node = self.case.ranks_per_node
        node = sum(1 << rank for rank in range(self.case.world_size) if rank // per_node == target // per_node)
        holders = self.holders[values.ravel()]
        assert not any(mask >> target & 1 for mask in holders)
        is_near = sender // per_node == target // per_node
        assert is_near or not any(mask & node for mask in holders)
        self.counted["received_within" if is_near else "received_across", target] += values.size
        self.counted["sent_within" if is_near else "sent_across", sender] += values.size

    def assert_filled(self) -> None:
        """Every element of every target is the checkpoint's, and padding is untouched."""
        for shards, filled in zip(self.case.after, self.filled, strict=True):
            for name, expected in _held(shards, self.full).items():
                np.testing.assert_array_equal(filled[name], expected, err_msg=name)

    def assert_loads_are_the_closed_form(self) -> None:
        """What is kept and received is exact; a share of what is sent is cut between rows."""
        case = self.case
        asked = asked_of(cells_of(case.sources, case.ranks_per_node), case.targets)
        loads = loads_of(asked, case.targets, case.ranks_per_node, case.world_size)
        widest = max((int(np.prod(size[1:])) for size in case.shapes.values()), default=1)
        for rank, load in enumerate(loads):
            for way in ("kept", "received_within", "received_across"):
                assert getattr(load, way) == self.counted[way, rank], (way, rank)
            targets = [len(case.targets[index].ranks) for index, holders in asked if rank in holders.ranks]
            for way in ("sent_within", "sent_across"):
                assert abs(getattr(load, way) - self.counted[way, rank]) <= widest * sum(targets), (way, rank)


def check(case: Case, bucket_numel: int) -> None:
    """Plan for all ranks and carry it out."""
    world = World(case, case.plans(), bucket_numel)
    world.run()
    world.assert_filled()
    world.assert_loads_are_the_closed_form()


@st.composite
def publications(draw: st.DrawFn) -> Case:
    """Draw a model, a trainer's layout, and engines on the same ranks, on others, or on some of both."""
    shape = draw(model_shapes())
    if shape.num_experts and shape.family != "MixtralForCausalLM":
        shape = replace(shape, dense_layers=tuple(i for i in range(shape.num_layers) if draw(st.booleans())))
    layout, engine = draw(layouts_of(shape)), draw(engines_of(shape))
    first = draw(st.sampled_from([0, layout.world_size, layout.world_size // 2]))
    engines = max(1, layout.world_size // engine.tp) if first == 0 else draw(st.integers(1, 3))
    return publication(shape, layout, engine, range(first, first + engines * engine.tp), draw(st.integers(1, 12)))


@settings(max_examples=80, deadline=None)
@given(publications(), st.integers(1, 3000))
def test_publishing_from_any_layout_fills_every_engine_with_the_checkpoints_content(case: Case, bucket: int) -> None:
    check(case, bucket)


@pytest.mark.long
@settings(max_examples=2000, deadline=None)
@given(publications(), st.integers(1, 3000))
def test_publishing_fills_every_engine_from_thousands_of_layouts(case: Case, bucket: int) -> None:
    check(case, bucket)


def _cuts(rng: Random, rows: int, parts: int) -> list[int]:
    """Return where uneven parts of ``rows`` begin and end; some may be empty."""
    return [0, *sorted(rng.randint(0, rows) for _ in range(parts - 1)), rows]


@settings(max_examples=60, deadline=None)
@given(model_shapes(), st.integers(1, 6), st.sampled_from([1, 2, 4]), st.integers(0, 1 << 30), st.integers(1, 8))
def test_tensors_split_unevenly_along_dim_0_arrive_where_engines_split_them_along_dim_1(
    shape: ModelShape, num_ranks: int, tp: int, seed: int, ranks_per_node: int
) -> None:
    rng, shapes = Random(seed), hf_shapes(shape)
    alike_on_all_layers = rng.random() < 0.5
    before: list[list[Shard]] = [[] for _ in range(num_ranks)]
    for name, size in shapes.items():
        cuts = _cuts(Random(size[0]) if alike_on_all_layers else rng, size[0], num_ranks)
        for rank, (low, high) in enumerate(pairwise(cuts)):
            if low < high:
                before[rank].append(Shard(name, (high - low, *size[1:]), 0, (Segment(name, low, high),)))
    after = [vllm_shards(shape, EngineLayout(tp), rank % tp) for rank in range(tp * rng.randint(1, 2))]
    check(case_of(shapes, before, after, ranks_per_node), rng.randint(1, 500))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_exporting_from_any_layout_gives_every_tensor_of_the_checkpoint_whole(data: st.DataObject) -> None:
    shape = data.draw(model_shapes())
    layout = data.draw(layouts_of(shape))
    shapes = hf_shapes(shape)
    after: list[list[Shard]] = [[] for _ in range(layout.world_size)]
    for i, (name, size) in enumerate(shapes.items()):
        after[i % layout.world_size].append(whole(name, size))
    before = [megatron_shards(shape, layout, rank) for rank in range(layout.world_size)]
    check(Case(shapes, before, after, megatron_peers(shape, layout), peers_of(after), 4), 1000)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_peers_hold_what_the_shards_of_every_rank_say(data: st.DataObject) -> None:
    shape = data.draw(model_shapes())
    layout = data.draw(layouts_of(shape))
    peers = megatron_peers(shape, layout)
    for rank in range(layout.world_size):
        shards = [s for p in peers if rank in p.ranks for pattern in p.patterns for s in pattern.shards()]
        assert sorted(shards, key=str) == sorted(megatron_shards(shape, layout, rank), key=str)
        assert sorted((s for p in alike(shards) for s in p.shards()), key=str) == sorted(shards, key=str)


NUM_ROWS, NUM_COLUMNS = 12, 7


@st.composite
def windows(draw: st.DrawFn, rank: int) -> Shard:
    """Draw a shard of some rows or columns of the one tensor ``t``, on either side of some padding."""
    dim = draw(st.sampled_from([0, 0, 1]))
    end = (NUM_ROWS, NUM_COLUMNS)[dim]
    start = draw(st.integers(0, end - 1))
    stop = draw(st.integers(start + 1, end))
    padding, first = draw(st.integers(0, 2)), draw(st.booleans())
    segments = [Segment("t", start, stop), *([Segment(None, 0, padding)] if padding else [])]
    size = stop - start + padding
    shape = (size, NUM_COLUMNS) if dim == 0 else (NUM_ROWS, size)
    return Shard(f"w{rank}", shape, dim, tuple(segments if first else reversed(segments)))


@st.composite
def scattered(draw: st.DrawFn) -> Case:
    """Draw ranks that hold and need arbitrary windows, overlapping and incomplete ones too."""
    num_ranks = draw(st.integers(1, 5))
    before = [[draw(windows(rank))] if draw(st.booleans()) else [] for rank in range(num_ranks)]
    after = [[draw(windows(rank))] for rank in range(num_ranks)]
    return case_of({"t": (NUM_ROWS, NUM_COLUMNS)}, before, after, draw(st.integers(1, 4)))


def _elements(shards: Sequence[Shard]) -> set[int]:
    full = _contents({"t": (NUM_ROWS, NUM_COLUMNS)})
    return {int(n) for tensor in _held(shards, full).values() for n in tensor.ravel() if n != UNTOUCHED}


@settings(max_examples=600, deadline=None)
@given(scattered(), st.integers(1, 100))
def test_windows_of_any_kind_are_filled_or_their_first_missing_row_is_named(case: Case, bucket: int) -> None:
    somewhere = {n for shards in case.before for n in _elements(shards)}
    missing = [(rank, min(lost)) for rank, shards in enumerate(case.after) if (lost := _elements(shards) - somewhere)]
    if not missing:
        check(case, bucket)
        return
    rank, element = missing[0]
    row = element // NUM_COLUMNS
    with pytest.raises(PublishError, match=rf"no rank holds row {row} of t, needed by w{rank} on rank {rank}$"):
        case.plans()


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.sampled_from([1, 2, 4]))
def test_replicas_that_hold_the_same_share_the_sending(num_holders: int, num_others: int, tp: int) -> None:
    shape = model_shape()
    before = [megatron_shards(shape, Layout(1), 0) for _ in range(num_holders)]
    after = [*([()] * num_holders), *(vllm_shards(shape, EngineLayout(tp), rank % tp) for rank in range(num_others))]
    case = case_of(hf_shapes(shape), before, after, num_holders + num_others)
    sent = [sum(s.numel for s in plan.sends.values()) for plan in case.plans()[:num_holders]]
    assert max(sent) - min(sent) <= num_others * shape.hidden_size * 8


def test_a_tensor_that_no_stage_holds_is_an_error_that_names_it_on_every_rank() -> None:
    shape, layout = model_shape(), Layout(4, tp=2, pp=2)
    before = [megatron_shards(shape, layout, rank) if rank >= 2 else () for rank in range(4)]
    case = case_of(hf_shapes(shape), before, [vllm_shards(shape, EngineLayout(2), rank % 2) for rank in range(4)], 4)
    for rank in range(4):
        with pytest.raises(PublishError, match=r"no rank holds row 0 of model\.embed_tokens\.weight, needed by"):
            plan_reshard(cells_of(case.sources, 4), case.targets, rank)


def test_a_plan_that_fits_is_one_exchange_and_one_without_traffic_is_none() -> None:
    shape = model_shape()
    case = publication(shape, Layout(4, tp=2, pp=2), EngineLayout(4), range(4), 4)
    assert {plan.num_exchanges(1 << 20) for plan in case.plans()} == {1}
    alone = publication(shape, Layout(1), EngineLayout(), range(1), 1)
    assert [plan.num_exchanges(1 << 20) for plan in alone.plans()] == [0]


LARGE = {
    "32 ranks": (Layout(32, tp=8, pp=4, ep=8, etp=1), 16),
    "128 ranks": (Layout(128, tp=8, pp=4, ep=8, etp=1), 8),
    "1,024 ranks": (Layout(1024, tp=8, pp=4, ep=8, etp=1), 8),
    "1,024 ranks, EP 128": (Layout(1024, tp=4, pp=8, ep=128, etp=1), 16),
}
BF16_BYTES = 2


*SMALLER, LARGEST = LARGE


@pytest.mark.parametrize("name", [*SMALLER, pytest.param(LARGEST, marks=pytest.mark.long)])
def test_a_rank_plans_a_model_of_235_billion_parameters_in_seconds_and_few_exchanges(name: str) -> None:
    config = shipped_config("Qwen/Qwen3-235B-A22B")
    assert config is not None
    shape, (layout, tp) = parse_model_shape(config, ""), LARGE[name]
    targets = vllm_peers(shape, EngineLayout(tp), range(layout.world_size))

    def plan(rank: int) -> RankPlan:
        return plan_reshard(cells_of(megatron_peers(shape, layout), 8), targets, rank)

    started_s = time.process_time()
    plans = [plan(rank) for rank in (0, layout.world_size // 2, layout.world_size - 1)]
    assert time.process_time() - started_s < 3 * 5
    tracemalloc.start()
    plans.append(plan(1))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 300e6
    (num_exchanges,) = {p.num_exchanges(BUCKET_BYTES // BF16_BYTES) for p in plans}
    of_these = max(sum(s.numel for s in way.values()) for p in plans for way in (p.sends, p.receives))
    assert num_exchanges <= 1.2 * of_these * BF16_BYTES / BUCKET_BYTES + 1
    for p in plans:
        for streams in (p.sends, p.receives):
            widest = sum(s.widest_row for s in streams.values())
            carried = max(
                sum(s.cut(k + 1, num_exchanges) - s.cut(k, num_exchanges) for s in streams.values())
                for k in range(0, num_exchanges, 25)
            )
            assert carried * BF16_BYTES <= BUCKET_BYTES + widest * BF16_BYTES


def test_rows_of_every_tensor_on_1024_ranks_are_planned_in_seconds_too() -> None:
    config = shipped_config("Qwen/Qwen3-32B")
    assert config is not None
    shape, num_ranks = parse_model_shape(config, ""), 1024
    kinds = [(n, s, e) for e in entries(shape) for n, s in zip(e.hf, e.sizes, strict=True)]

    def rows_of(rank: int) -> Peers:
        patterns: list[Pattern] = []
        for name, size, entry in kinds:
            low, high = size[0] * rank // num_ranks, size[0] * (rank + 1) // num_ranks
            shard = Shard(name, (high - low, *size[1:]), 0, (Segment(name, low, high),))
            patterns += entry.patterns(shard, shape, range(shape.num_layers), ()) if low < high else ()
        return Peers((rank,), tuple(patterns))

    sources = [rows_of(rank) for rank in range(num_ranks)]
    started_s = time.process_time()
    plan = plan_reshard(cells_of(sources, 8), vllm_peers(shape, EngineLayout(8), range(num_ranks)), 5)
    assert time.process_time() - started_s < 5
    received = sum(stream.numel for stream in plan.receives.values())
    kept = sum(flow.numel for flow in plan.kept)
    assert received + kept == sum(math.prod(shard.shape) for shard in vllm_shards(shape, EngineLayout(8), 5))
