"""Publish the trainer's weights to the rollout engine: shard to shard, in memory, in place."""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed as dist
from torch import Tensor

from megarl.errors import PublishError
from megarl.rollout.engine import RolloutEngine
from megarl.train.backend import Backend
from megarl.weights.name_map import megatron_shards, vllm_shards
from megarl.weights.reshard import Resharder
from megarl.weights.reshard_plan import plan_reshard


class Publisher:
    """Moves the weights of a backend into the shards of ``engine``. All methods are collective over all ranks.

    Raises PublishError where the engine's parameters aren't those of the name map.
    """

    def __init__(self, backend: Backend, engine: RolloutEngine, engine_tp: int) -> None:
        self.backend, self.engine, self.engine_tp = backend, engine, engine_tp
        shape, layout, own_rank = backend.role.shape, backend.role.layout, dist.get_rank()
        ranks = range(layout.world_size)
        sources = [megatron_shards(shape, layout, rank) for rank in ranks]
        targets = [vllm_shards(shape, engine_tp, rank % engine_tp) for rank in ranks]
        found = {name: tuple(p.shape) for name, p in _by_expert(engine.parameters()).items()}
        expected = {s.name: s.shape for s in targets[own_rank]}
        if found != expected:
            odd = sorted(set(found.items()) ^ set(expected.items()))
            raise PublishError(f"the engine's parameters and the name map disagree on rank {own_rank}: {odd[:4]}")
        dtype = next(iter(engine.parameters().values())).dtype
        self.resharder = Resharder(plan_reshard(sources, targets), dtype=dtype)

    def publish(self, policy_version: int) -> None:
        """Copy the weights, and stamp later rollouts with ``policy_version``."""
        with self.backend.resident():
            sources, targets = self.backend.parameters(), _by_expert(self.engine.parameters())
            self.resharder.run(sources, targets, self.backend.device)
        self.engine.publish_done(policy_version)


def _by_expert(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return parameters as the name map has them: one view an expert of those that hold all experts of a layer."""
    found: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        if ".routed_experts." in name:
            found |= {f"{name}.{expert}": of_one for expert, of_one in enumerate(parameter.unbind())}
        else:
            found[name] = parameter
    return found
