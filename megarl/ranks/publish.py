"""Publish the trainer's weights to the rollout engine: shard to shard, in memory, in place."""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist

from megarl.errors import PublishError
from megarl.rollout.engine import RolloutEngine
from megarl.train.backend import Backend
from megarl.weights.cells import cells_of
from megarl.weights.name_map import vllm_peers
from megarl.weights.reshard import Resharder, node_size
from megarl.weights.reshard_plan import plan_reshard
from megarl.weights.shard import Pattern


class Publisher:
    """Moves the weights of a backend into the shards of ``engine``. All methods are collective over all ranks.

    Raises PublishError where the engine's parameters aren't those of the name map.
    """

    def __init__(self, backend: Backend, engine: RolloutEngine, engine_tp: int) -> None:
        self.backend, self.engine, self.engine_tp = backend, engine, engine_tp
        shape, rank, device = backend.role.shape, dist.get_rank(), backend.device
        targets = vllm_peers(shape, engine_tp, range(backend.role.layout.world_size))
        parameters = engine.parameters()
        own = [pattern for peers in targets if rank in peers.ranks for pattern in peers.patterns]
        odd = sorted({(n, tuple(p.shape)) for n, p in parameters.items()} ^ set(_parameter_shapes(own).items()))
        if odd:
            raise PublishError(f"the engine's parameters and the name map disagree on rank {rank}: {odd[:4]}")
        sources = cells_of(backend.peers(), node_size(device))
        dtype = next(iter(parameters.values())).dtype
        self.resharder = Resharder(plan_reshard(sources, targets, rank), dtype=dtype)

    def publish(self, policy_version: int) -> None:
        """Copy the weights, and stamp later rollouts with ``policy_version``."""
        with self.backend.resident():
            self.resharder.run(self.backend.parameters(), self.engine.parameters(), self.backend.device)
        self.engine.publish_done(policy_version)


def _parameter_shapes(patterns: Iterable[Pattern]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by name: vLLM stacks the experts of a layer in one, which ``{e}`` counts."""
    shapes: dict[str, tuple[int, ...]] = {}
    for pattern in patterns:
        name, is_stacked, _ = pattern.shard.name.partition(".{e}")
        shape = (len(pattern.experts), *pattern.shard.shape) if is_stacked else pattern.shard.shape
        shapes |= {name.format(i=i): shape for i in pattern.layers}
    return shapes
