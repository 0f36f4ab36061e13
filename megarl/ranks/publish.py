"""Publish the trainer's weights to the rollout engine, in memory and in place: shard to shard, or by whole tensors.

An engine in the same ranks is written by them. One in processes of its own reads what they have written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.errors import PublishError
from megarl.parallel.layout import EngineLayout
from megarl.ranks.across import Meeting, MirroredRank
from megarl.rollout.engine import RolloutEngine
from megarl.rollout.sglang import SglangSpec
from megarl.rollout.vllm import VllmSpec
from megarl.train.backend import Backend
from megarl.weights.cells import cells_of
from megarl.weights.engine_parameters import EngineParameters
from megarl.weights.files import plan_files
from megarl.weights.name_map import hf_shapes, vllm_peers
from megarl.weights.reshard import Resharder, node_size
from megarl.weights.reshard_plan import BUCKET_BYTES, plan_reshard
from megarl.weights.shard import Peers, alike, whole
from megarl.weights.shared import Segment, SharedWriter
from megarl.weights.shared_plan import writer_plan


class Publisher(Protocol):
    """Moves the weights of a backend into an engine. Making it and its method are collective over all ranks."""

    def publish(self, policy_version: int, *, verify: bool = False) -> Segment | None:
        """Copy the weights, and stamp later rollouts with ``policy_version``.

        verify: compare checksums of what was sent and what has arrived; raises PublishError where they differ. Return
        where they wait for an engine in processes of its own, None where they have arrived.
        """
        ...


def publisher_of(backend: Backend, engine: RolloutEngine, split: EngineLayout) -> Publisher:
    """Return the Publisher of a model: planned where the name map has its family, by whole tensors elsewhere."""
    if backend.role.shape.is_mapped:
        return PlannedPublisher(backend, engine, split)
    return WholePublisher(backend, engine)


class PlannedPublisher:
    """Moves every row once, from the shards of the backend to those of ``engine``.

    Raises PublishError where the engine's parameters aren't those of the name map.
    """

    def __init__(self, backend: Backend, engine: RolloutEngine, split: EngineLayout) -> None:
        self.backend, self.engine = backend, engine
        shape, rank, device = backend.role.shape, dist.get_rank(), backend.device
        targets = vllm_peers(shape, split, range(backend.role.layout.world_size))
        parameters = engine.parameters()
        self.of_engine = EngineParameters(parameters, shape, split, rank % split.tp)
        sources = cells_of(backend.peers(), node_size(device))
        dtype = next(iter(parameters.values())).dtype
        self.resharder = Resharder(plan_reshard(sources, targets, rank), dtype=dtype)

    def publish(self, policy_version: int, *, verify: bool = False) -> None:
        """Copy the weights, and stamp later rollouts with ``policy_version``. verify: see Publisher."""
        with self.backend.resident():
            targets = self.of_engine.by_name(self.engine.parameters())
            ends = self.backend.parameters(), targets, self.backend.device
            self.resharder.run(*ends)
            if verify:
                self.resharder.verify(*ends)
        self.engine.publish_done(policy_version)


class SharedPublisher:
    """Writes weights where engines on the same host read them, and sends them to hosts that it has met.

    spec: of the engines.
    """

    def __init__(self, backend: Backend, spec: VllmSpec | SglangSpec) -> None:
        self.backend = backend
        role, dtype = backend.role, getattr(torch, spec.dtype)
        assert isinstance(dtype, torch.dtype)
        whole = isinstance(spec, SglangSpec)
        plan = writer_plan(role.shape, role.layout, spec.layout, dist.get_rank(), dtype.itemsize, whole=whole)
        self.writer = SharedWriter(plan, dtype)
        self.mirrored = MirroredRank(dist.get_rank(), self.writer.segment)

    def meet(self, meetings: Sequence[Meeting]) -> None:
        """Meet hosts that engines are on, beside those that were met before."""
        self.mirrored.meet(meetings)

    def publish(self, policy_version: int, *, verify: bool = False) -> Segment:
        """Write the weights as publication ``policy_version``. verify: with checksums, which engines compare."""
        with self.backend.resident():
            segment = self.writer.write(self.backend.parameters(), policy_version, verify=verify)
        self.mirrored.send(self.writer.memory)
        return segment


class WholePublisher:
    """Gives every rank of ``engine`` whole tensors by the names of a checkpoint, of which it takes its part itself.

    A rank has ``bucket_bytes`` of them at a time, or one larger tensor. Raises PublishError where the engine has
    parameters that none of them went into.
    """

    def __init__(self, backend: Backend, engine: RolloutEngine, bucket_bytes: int = BUCKET_BYTES) -> None:
        self.backend, self.engine = backend, engine
        self.dtype = next(iter(engine.parameters().values())).dtype
        self._shapes = hf_shapes(backend.role.shape)
        sources = cells_of(backend.peers(), node_size(backend.device))
        everyone = tuple(range(backend.role.layout.world_size))
        self._buckets = []
        for names in plan_files(self._shapes, self.dtype.itemsize, bucket_bytes):
            targets = (Peers(everyone, alike(whole(name, self._shapes[name]) for name in names)),)
            plan = plan_reshard(sources, targets, dist.get_rank())
            self._buckets.append((names, Resharder(plan, dtype=self.dtype, bucket_bytes=bucket_bytes)))

    def publish(self, policy_version: int, *, verify: bool = False) -> None:
        """Copy the weights, and stamp later rollouts with ``policy_version``.

        verify: see Publisher; of the whole tensors that the engine is given.
        """
        with self.backend.resident():
            filled = self.engine.load_weights(self._tensors(verify))
        missing = sorted(set(self.engine.parameters()) - filled)
        if missing:
            raise PublishError(
                f"the engine has parameters that no tensor of {self.backend.role.shape.family} went into: {missing[:4]}"
            )
        self.engine.publish_done(policy_version)

    def _tensors(self, verify: bool) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor, whole. Ranks go on together from one bucket to the next."""
        parameters, device = self.backend.parameters(), self.backend.device
        for names, resharder in self._buckets:
            tensors = {name: torch.empty(self._shapes[name], dtype=self.dtype, device=device) for name in names}
            resharder.run(parameters, tensors, device)
            if verify:
                resharder.verify(parameters, tensors, device)
            yield from tensors.items()
