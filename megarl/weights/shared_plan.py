"""What a trainer's ranks write, and the ranks of an engine read, where the weights wait in the memory of a host.

The ranks of an engine follow those of the trainer in a reshard plan, as one host. All engines read the same. Of a
family outside of the name map, and where the engine wants them so, all ranks of an engine read the same whole tensors,
a few at a time, of which the engine takes its part.
"""

from __future__ import annotations

from dataclasses import dataclass

from megarl.parallel.layout import EngineLayout, Layout
from megarl.weights.cells import Sources, cells_of
from megarl.weights.files import plan_files
from megarl.weights.model_shape import ModelShape
from megarl.weights.name_map import hf_shapes, vllm_peers
from megarl.weights.reshard_plan import BUCKET_BYTES, Load, RankPlan, asked_of, loads_of, plan_reshard
from megarl.weights.shard import Peers, alike
from megarl.weights.shard import whole as whole_tensor
from megarl.weights.trainer_peers import trainer_peers


@dataclass(frozen=True)
class SharedPlan:
    """What one rank writes or reads, one plan after another. names: of the whole tensors of each, where it is those."""

    names: tuple[tuple[str, ...], ...]
    plans: tuple[RankPlan, ...]


def writer_plan(
    shape: ModelShape, layout: Layout, engine: EngineLayout, rank: int, itemsize: int, *, whole: bool = False
) -> SharedPlan:
    """Return the SharedPlan of what ``rank`` of the trainer writes for ``engine``. itemsize: of an element there.

    whole: whether engines want whole tensors; they get them as well where the name map doesn't have the family.
    """
    return _plan(shape, layout, engine, rank, itemsize, whole=whole or not shape.is_mapped)


def reader_plan(
    shape: ModelShape, layout: Layout, engine: EngineLayout, tp_rank: int, itemsize: int, *, whole: bool = False
) -> SharedPlan:
    """Return the SharedPlan of what ``tp_rank`` of an engine reads; of whole tensors all ranks read the same."""
    whole = whole or not shape.is_mapped
    return _plan(shape, layout, engine, layout.world_size + (0 if whole else tp_rank), itemsize, whole=whole)


def shared_loads(shape: ModelShape, layout: Layout, engine: EngineLayout) -> tuple[Load, ...]:
    """Return the Load of every rank of the trainer, and then of an engine, whose elements all are within a node."""
    sources, targets = _sources(shape, layout, engine), _engine_peers(shape, layout, engine)
    world_size = layout.world_size + engine.tp
    return loads_of(asked_of(sources, targets), targets, world_size, world_size)


def _sources(shape: ModelShape, layout: Layout, engine: EngineLayout) -> Sources:
    return cells_of(trainer_peers(shape, layout), layout.world_size + engine.tp)


def _engine_peers(shape: ModelShape, layout: Layout, engine: EngineLayout) -> tuple[Peers, ...]:
    """Return the Peers of an engine. Of a family outside of the map its first rank stands for all."""
    first = layout.world_size
    return vllm_peers(shape, engine, range(first, first + (engine.tp if shape.is_mapped else 1)))


def _plan(
    shape: ModelShape, layout: Layout, engine: EngineLayout, rank: int, itemsize: int, *, whole: bool
) -> SharedPlan:
    sources = _sources(shape, layout, engine)
    if not whole:
        return SharedPlan(((),), (plan_reshard(sources, _engine_peers(shape, layout, engine), rank),))
    shapes, reader = hf_shapes(shape), (layout.world_size,)
    names = plan_files(shapes, itemsize, BUCKET_BYTES)
    targets = [(Peers(reader, alike(whole_tensor(name, shapes[name]) for name in bucket)),) for bucket in names]
    return SharedPlan(names, tuple(plan_reshard(sources, target, rank) for target in targets))
