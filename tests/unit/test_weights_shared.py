"""Weights in memory that a trainer's ranks and engines have mapped: of any layout, for engines of any size."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megarl.errors import PublishError
from megarl.parallel.layout import EngineLayout, Layout
from megarl.ranks.across import Meeting, Mirror, MirroredRank
from megarl.weights.fsdp_map import fsdp_shards
from megarl.weights.model_shape import ModelShape
from megarl.weights.name_map import hf_shapes, megatron_shards, vllm_shards
from megarl.weights.shard import Shard
from megarl.weights.shared import Segment, SharedReader, SharedWriter, host_name
from megarl.weights.shared_plan import reader_plan, shared_loads, writer_plan
from tests.unit.model_shapes import engines_of, layouts_of, model_shape, model_shapes

Tensors = dict[str, Tensor]
PADDING = -1.0


def contents(shape: ModelShape, first: int = 0) -> Tensors:
    """Return whole tensors in which every element of the model has a number of its own, from ``first``."""
    tensors = {}
    for name, size in hf_shapes(shape).items():
        numel = int(torch.Size(size).numel())
        tensors[name] = torch.arange(first, first + numel, dtype=torch.float32).reshape(size)
        first += numel
    return tensors


def held(shards: Sequence[Shard], full: Tensors) -> Tensors:
    """Return what a rank with these shards holds of whole tensors."""
    found = {}
    for shard in shards:
        parts = []
        for seg in shard.segments:
            if seg.tensor is None:
                size = [seg.length if dim == shard.dim else n for dim, n in enumerate(shard.shape)]
                parts.append(torch.full(size, PADDING))
            else:
                parts.append(full[seg.tensor].narrow(shard.dim, seg.start, seg.length))
        found[shard.name] = torch.cat(parts, shard.dim)
    return found


@dataclass(frozen=True)
class Trainer:
    """The ranks of a trainer that write for engines."""

    shape: ModelShape
    layout: Layout
    engine: EngineLayout
    dtype: torch.dtype = torch.float32

    def writers(self) -> list[SharedWriter]:
        """Return the writer of every rank."""
        ranks, itemsize = range(self.layout.world_size), self.dtype.itemsize
        plans = [writer_plan(self.shape, self.layout, self.engine, rank, itemsize) for rank in ranks]
        return [SharedWriter(plan, self.dtype) for plan in plans]

    def write(
        self, writers: Sequence[SharedWriter], full: Tensors, policy_version: int, *, verify: bool = True
    ) -> list[Segment]:
        """Have every rank write its part of whole tensors."""
        shards = fsdp_shards if self.layout.is_fsdp else megatron_shards
        parts = [held(shards(self.shape, self.layout, r), full) for r in range(len(writers))]
        return [w.write(part, policy_version, verify=verify) for w, part in zip(writers, parts, strict=True)]

    def reader(self, tp_rank: int) -> SharedReader:
        """Return the reader of a rank of an engine."""
        plan = reader_plan(self.shape, self.layout, self.engine, tp_rank, self.dtype.itemsize)
        return SharedReader(plan, self.dtype)


@settings(max_examples=12)
@given(data=st.data(), shape=model_shapes())
def test_every_rank_of_every_engine_reads_what_it_needs_and_each_element_is_written_once(
    data: st.DataObject, shape: ModelShape
) -> None:
    engine = data.draw(engines_of(shape))
    trainer, tp = Trainer(shape, data.draw(layouts_of(shape)), engine), engine.tp
    writers = trainer.writers()
    for version in (0, 1):  # the second over the first
        full = contents(shape, first=version)
        segments = trainer.write(writers, full, version)
        for tp_rank in (*range(tp), *range(tp)):  # of two engines
            expected = held(vllm_shards(shape, engine, tp_rank), full)
            targets = {name: torch.full_like(tensor, PADDING) for name, tensor in expected.items()}
            reader = trainer.reader(tp_rank)
            reader.check(segments, version)
            reader.read(segments, 0, targets)
            assert all(torch.equal(targets[name], tensor) for name, tensor in expected.items())
            reader.verify(segments, 0, targets)
    shards = [shard for tp_rank in range(tp) for shard in vllm_shards(shape, engine, tp_rank)]
    needed = sum(seg.length * s.shape[1 - s.dim] if len(s.shape) > 1 else seg.length
                 for s in shards for seg in s.segments if seg.tensor)  # fmt: skip
    written = sum(stream.numel for w in writers for plan in w.plan.plans for stream in plan.sends.values())
    assert written == needed
    loads = shared_loads(shape, trainer.layout, engine)
    assert sum(load.received_within for load in loads) == pytest.approx(sum(load.sent_within for load in loads))
    assert sum(load.received_within for load in loads) == needed


def test_shards_of_fsdp_reach_an_engine_in_its_own_dtype() -> None:
    trainer = Trainer(model_shape(tied=True), Layout(3, fsdp=3), EngineLayout(2), torch.bfloat16)
    full = contents(trainer.shape)
    segments = trainer.write(trainer.writers(), full, 0)
    for tp_rank in range(2):
        expected = held(vllm_shards(trainer.shape, EngineLayout(2), tp_rank), full)
        targets = {name: torch.full_like(t, PADDING, dtype=torch.bfloat16) for name, t in expected.items()}
        reader = trainer.reader(tp_rank)
        reader.read(segments, 0, targets)
        reader.verify(segments, 0, targets)
        assert all(torch.equal(targets[name], tensor.bfloat16()) for name, tensor in expected.items())


def test_of_a_family_outside_the_map_all_ranks_of_an_engine_read_whole_tensors() -> None:
    tensors = (("a.weight", (5, 3)), ("b.bias", (4,)), ("c.weight", (7, 2)))
    trainer = Trainer(replace(model_shape(), tensors=tensors), Layout(2, fsdp=2), EngineLayout(2))
    full = contents(trainer.shape)
    segments = trainer.write(trainer.writers(), full, 0)
    for tp_rank in range(2):
        reader = trainer.reader(tp_rank)
        assert [name for names in reader.plan.names for name in names] == [name for name, _ in tensors]
        for index, names in enumerate(reader.plan.names):
            targets = {name: torch.full_like(full[name], PADDING) for name in names}
            reader.read(segments, index, targets)
            reader.verify(segments, index, targets)
            assert all(torch.equal(targets[name], full[name]) for name in names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_bit_that_an_engine_holds_otherwise_is_named_with_its_parameter_and_who_sent_it(dtype: torch.dtype) -> None:
    trainer = Trainer(model_shape(), Layout(4, tp=2, pp=2), EngineLayout(2), dtype)
    segments = trainer.write(trainer.writers(), contents(trainer.shape), 0)
    reader, targets = _read(trainer, segments)
    reader.verify(segments, 0, targets)
    name = f"model.layers.{trainer.shape.num_layers - 1}.self_attn.qkv_proj.weight"
    targets[name].view(torch.uint8)[-1, -1] ^= 1
    rows = targets[name].shape[0]
    says = rf"^rank 1 of the engine doesn't hold what rank [23] of the trainer sent: 1 of .* of {name}\[\d+:{rows}\]$"
    with pytest.raises(PublishError, match=says):
        reader.verify(segments, 0, targets)


def test_a_publication_that_is_not_verified_brings_no_checksums_and_compares_none() -> None:
    trainer = Trainer(model_shape(), Layout(1), EngineLayout(2))
    segments = trainer.write(trainer.writers(), contents(trainer.shape), 0, verify=False)
    assert all(segment.checksums == () for segment in segments)
    reader, targets = _read(trainer, segments)
    for target in targets.values():
        target.zero_()
    reader.verify(segments, 0, targets)


def _read(trainer: Trainer, segments: Sequence[Segment]) -> tuple[SharedReader, Tensors]:
    """Return the reader of an engine's rank 1, and what it has read."""
    reader, shards = trainer.reader(1), vllm_shards(trainer.shape, trainer.engine, 1)
    targets = {shard.name: torch.zeros(shard.shape, dtype=trainer.dtype) for shard in shards}
    reader.read(segments, 0, targets)
    return reader, targets


def test_weights_of_another_publication_or_that_are_half_written_are_refused() -> None:
    trainer = Trainer(model_shape(), Layout(2, 2), EngineLayout(1))
    writers, full = trainer.writers(), contents(trainer.shape)
    segments = trainer.write(writers, full, 3)
    reader = trainer.reader(0)
    reader.check(segments, 3)
    with pytest.raises(PublishError, match=r"rank 0 are those of publication 3; the engine was told to take 4"):
        reader.check(segments, 4)
    with pytest.raises(KeyError):
        writers[1].write({}, 4)
    with pytest.raises(PublishError, match=r"rank 1 are those of publication 4, of which 3 is whole; .* take 3"):
        reader.check(segments, 3)


def test_memory_of_a_process_that_has_ended_is_an_error_that_says_what_is_needed() -> None:
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    trainer = Trainer(model_shape(), Layout(1), EngineLayout(1))
    with pytest.raises(PublishError, match="can't open the memory that holds the weights, /proc/"):
        trainer.reader(0).check([Segment(host_name(), int(ended.stdout), 3, 64, ({},))], 0)


def test_the_memory_has_no_name_that_could_stay_behind() -> None:
    trainer = Trainer(model_shape(), Layout(1), EngineLayout(1))
    [segment] = trainer.write(trainer.writers(), contents(trainer.shape), 0)
    assert os.readlink(f"/proc/{segment.pid}/fd/{segment.fd}") == "/memfd:megarl_weights (deleted)"


def together(*calls: Callable[[], object]) -> None:
    """Make calls at the same time, each of which waits for another."""
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def test_an_engine_on_another_host_reads_what_the_ranks_have_written() -> None:
    """Of four ranks the first is on the host of the engine, which has its own memory of the others' alone."""
    trainer = Trainer(replace(model_shape(), num_layers=2), Layout(4, tp=2, pp=2), EngineLayout(2))
    writers, mirror = trainer.writers(), Mirror("127.0.0.1", 30.0)
    segments = [replace(w.segment, host=w.segment.host if r == 0 else "another") for r, w in enumerate(writers)]
    ranks: dict[int, MirroredRank] = {}

    def meet(rank: int) -> None:
        ranks[rank] = MirroredRank(rank, segments[rank], [mirror.meeting])

    together(lambda: mirror.meet(segments), *(lambda r=r: meet(r) for r in range(4)))
    for version in (0, 1):
        full = contents(trainer.shape, first=version)
        written = trainer.write(writers, full, version)
        together(mirror.receive, *(lambda r=r: ranks[r].send(writers[r].memory) for r in range(4)))
        here = mirror.here([replace(s, host=known.host) for s, known in zip(written, segments, strict=True)])
        assert [(one.fd == other.fd) for one, other in zip(here, written, strict=True)] == [True, False, False, False]
        assert len({segment.host for segment in here}) == 1
        for tp_rank in range(2):
            expected = held(vllm_shards(trainer.shape, trainer.engine, tp_rank), full)
            targets = {name: torch.full_like(tensor, PADDING) for name, tensor in expected.items()}
            reader = trainer.reader(tp_rank)
            reader.check(here, version)
            reader.read(here, 0, targets)
            reader.verify(here, 0, targets)
            assert all(torch.equal(targets[name], tensor) for name, tensor in expected.items())


def test_a_publication_that_has_not_arrived_whole_is_none() -> None:
    trainer = Trainer(replace(model_shape(), num_layers=2), Layout(1), EngineLayout(1))
    [writer], mirror = trainer.writers(), Mirror("127.0.0.1", 1.0)
    [segment] = [replace(writer.segment, host="another")]
    ranks: list[MirroredRank] = []
    together(lambda: mirror.meet([segment]), lambda: ranks.append(MirroredRank(0, segment, [mirror.meeting])))
    trainer.write([writer], contents(trainer.shape), 0)
    together(mirror.receive, lambda: ranks[0].send(writer.memory))
    trainer.reader(0).check(mirror.here([segment]), 0)
    with pytest.raises(RuntimeError):
        mirror.receive()  # the rank sends nothing
    with pytest.raises(PublishError, match="are those of publication -1"):
        trainer.reader(0).check(mirror.here([segment]), 0)


def test_a_rank_goes_on_without_a_host_that_is_lost() -> None:
    trainer = Trainer(replace(model_shape(), num_layers=2), Layout(1), EngineLayout(1))
    [writer] = trainer.writers()
    segment, kept = replace(writer.segment, host="another"), Mirror("127.0.0.1", 5.0)
    ranks: list[MirroredRank] = []
    lost = subprocess.Popen([sys.executable, "-c", LOST_HOST], stdout=subprocess.PIPE, text=True)
    assert lost.stdout is not None
    host = Meeting("a third", "127.0.0.1", int(lost.stdout.readline()), 5.0)
    together(
        lambda: kept.meet([segment]),
        lambda: ranks.append(MirroredRank(0, segment, [host, kept.meeting])),
        lost.wait,  # which ends once the rank has met it
    )
    for version in (0, 1):
        trainer.write([writer], contents(trainer.shape), version)
        together(kept.receive, lambda: ranks[0].send(writer.memory))
        trainer.reader(0).check(kept.here([segment]), version)


def test_a_host_that_is_met_later_has_the_next_publication_as_the_others_have() -> None:
    trainer = Trainer(replace(model_shape(), num_layers=2), Layout(1), EngineLayout(1))
    [writer] = trainer.writers()
    segment, first, late = replace(writer.segment, host="another"), *(Mirror("127.0.0.1", 5.0) for _ in range(2))
    ranks: list[MirroredRank] = []
    together(lambda: first.meet([segment]), lambda: ranks.append(MirroredRank(0, segment, [first.meeting])))
    trainer.write([writer], contents(trainer.shape), 0)
    together(first.receive, lambda: ranks[0].send(writer.memory))
    together(lambda: late.meet([segment]), lambda: ranks[0].meet([late.meeting]))
    trainer.write([writer], contents(trainer.shape), 1)
    together(first.receive, late.receive, lambda: ranks[0].send(writer.memory))
    for mirror in (first, late):
        trainer.reader(0).check(mirror.here([segment]), 1)


LOST_HOST = """
from megarl.ranks.across import Mirror
from megarl.weights.shared import Segment
mirror = Mirror("127.0.0.1", 5.0)
print(mirror.meeting.port, flush=True)
mirror.meet([Segment("another", 0, 0, 4096, ())])
"""
