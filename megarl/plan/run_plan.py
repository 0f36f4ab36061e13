"""The plan of a run: what it does, where it lies, what it holds and moves, and whether that fits."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from megarl.batching.plan import BatchPlan
from megarl.checks.rules import num_ranks
from megarl.config.schema import PPOConfig
from megarl.errors import ConfigError, Problem
from megarl.plan.devices import Device
from megarl.plan.memory import Engine, Phase, engine_of, phases_of
from megarl.plan.publish import Traffic, publish_traffic
from megarl.plan.roles import DTYPE_BYTES, Role, roles_of
from megarl.plan.static import StaticBytes
from megarl.plan.topology import Topology, topology_of
from megarl.weights.files import plan_files
from megarl.weights.model_shape import ModelShape
from megarl.weights.name_map import hf_shapes

MAX_RANKS = 16_384


@dataclass(frozen=True)
class Checkpoint:
    """One save of the actor as a Hugging Face folder."""

    num_bytes: int
    num_files: int


@dataclass(frozen=True)
class RunPlan:
    """Everything that follows from a config, the models' sizes and a device."""

    device: Device
    num_ranks: int
    ranks_per_node: int
    batch: BatchPlan
    critic_batch: BatchPlan | None
    tokens_per_step: int
    max_sequence: int
    roles: tuple[Role, ...]
    topologies: tuple[Topology, ...]
    engine: Engine
    engine_tp: int
    phases: tuple[Phase, ...]
    traffic: Traffic | None
    checkpoint: Checkpoint

    @property
    def worst(self) -> Phase:
        """The phase with most on a device."""
        return max(self.phases, key=lambda phase: phase.device_bytes)

    @property
    def room_bytes(self) -> int:
        """What the worst phase leaves of the device; negative where it doesn't fit."""
        return self.device.memory_bytes - self.worst.device_bytes

    @property
    def cache_shortage_tokens(self) -> int:
        """Tokens that the KV cache lacks to hold one sequence of the longest kind; 0 where it does."""
        return max(0, self.max_sequence - self.engine.num_cached_tokens)

    @property
    def fits(self) -> bool:
        """Whether every phase fits the device, and the engine has a cache to work with."""
        return self.room_bytes >= 0 and not self.cache_shortage_tokens

    @property
    def host_bytes_per_node(self) -> int:
        """Host memory that a node needs in the phase with most of it, if all its ranks need as much as any."""
        return max(phase.most_host_bytes for phase in self.phases) * self.ranks_per_node


def plan_run(
    c: PPOConfig,
    shape: ModelShape,
    critic_shape: ModelShape | None,
    batch: BatchPlan,
    critic_batch: BatchPlan | None,
    device: Device,
    *,
    reward_shape: ModelShape | None = None,
    with_traffic: bool = True,
) -> RunPlan:
    """Return the plan of a checked config. with_traffic: plan publications too, which takes longest.

    Raises ConfigError for more ranks than any cluster has.
    """
    ranks, per_node = num_ranks(c), c.trainer.n_gpus_per_node
    if ranks > MAX_RANKS:
        key, allowed = "trainer.nnodes x trainer.n_gpus_per_node", f"a plan is made for up to {MAX_RANKS:,} ranks"
        raise ConfigError([Problem(key, f"{c.trainer.nnodes} x {per_node}", allowed, "fewer nodes")])
    roles = roles_of(c, shape, critic_shape, batch, critic_batch, reward_shape)
    engine, engine_tp = engine_of(c, shape, device), c.actor_rollout_ref.rollout.tensor_model_parallel_size
    b = DTYPE_BYTES[c.actor_rollout_ref.model.dtype]
    sequence = c.data.max_prompt_length + c.data.max_response_length
    return RunPlan(
        device=device,
        num_ranks=ranks,
        ranks_per_node=per_node,
        batch=batch,
        critic_batch=critic_batch,
        tokens_per_step=batch.num_rollouts * sequence,
        max_sequence=sequence,
        roles=roles,
        topologies=tuple(topology_of(role, per_node) for role in roles),
        engine=engine,
        engine_tp=engine_tp,
        phases=phases_of(roles, engine, device, examined_ranks(roles, ranks)),
        traffic=publish_traffic(shape, roles[0].layout, engine_tp, b, per_node, device) if with_traffic else None,
        checkpoint=_checkpoint(shape, b),
    )


@cache
def _checkpoint(shape: ModelShape, dtype_bytes: int) -> Checkpoint:
    tensors = hf_shapes(shape)
    numel = sum(math.prod(size) for size in tensors.values())
    return Checkpoint(numel * dtype_bytes, len(plan_files(tensors, dtype_bytes)))


def examined_ranks(roles: tuple[Role, ...], ranks: int) -> tuple[int, ...]:
    """Return the first rank of every kind: ranks of a kind are on the same stages and hold the same of every model."""
    at_rest: dict[str, Any] = {"update_tokens": 0, "score_tokens": 0, "num_micro_batches": 1, "recompute": None}
    at_rest |= {"param_offload": False, "grad_offload": False, "optimizer_offload": False}
    return _first_of_each_kind(tuple(replace(role, **at_rest) for role in roles), ranks)


@cache
def _first_of_each_kind(roles: tuple[Role, ...], ranks: int) -> tuple[int, ...]:
    first: dict[tuple[tuple[int, StaticBytes], ...], int] = {}
    for rank in range(ranks):
        first.setdefault(tuple((role.stage(rank), role.static(rank)) for role in roles), rank)
    return tuple(first.values())
