"""The plan of a run: what it does, where it lies, what it holds and moves, and whether that fits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from megarl.algorithm.needs import reuses_update
from megarl.batching.plan import BatchPlan
from megarl.config.schema import SYNC, PPOConfig, SFTConfig
from megarl.errors import ConfigError, Problem
from megarl.parallel.layout import EngineLayout
from megarl.plan.algorithm import algorithm_lines
from megarl.plan.devices import CPU, Device
from megarl.plan.engine_place import EnginePlace, EnginePlacer, engine_place
from megarl.plan.memory import Engine, Phase, engine_of, engine_phase, phases_of
from megarl.plan.publish import Traffic, handed_traffic, publish_traffic
from megarl.plan.sizes import FP32_BYTES, StaticBytes
from megarl.plan.static import Stored, stored_of
from megarl.plan.step_time import StepTime, step_time
from megarl.plan.topology import Topology, topology_of
from megarl.roles import Role, batch_plan, engine_layout, engines_share_devices, is_served, num_engines, num_ranks
from megarl.weights.adapters import adapter_shapes
from megarl.weights.files import plan_files
from megarl.weights.model_shape import ModelShape
from megarl.weights.name_map import hf_shapes

MAX_RANKS = 16_384


@dataclass(frozen=True)
class Checkpoint:
    """One save: the actor as a Hugging Face folder, and the state of all roles that are trained, for going on."""

    num_bytes: int
    num_files: int
    state_bytes: int


@dataclass(frozen=True)
class RunPlan:
    """Everything that follows from a config, the models' sizes and a device.

    algorithm: lines for people. num_scored_rollouts: rollouts of a step whose old log-probs need a pass of their own.
    engine: None in supervised fine-tuning, which generates nothing. engine_nodes: of engines in processes of their own,
    whose ranks are counted after the trainer's. engine_place: on whose nodes engines are. shares_devices: whether
    these are on the ranks' devices. num_steps: None where it follows from data files that aren't here. time: of a step,
    None in supervised fine-tuning.
    """

    device: Device
    num_ranks: int
    ranks_per_node: int
    batches: Mapping[str, BatchPlan]
    algorithm: tuple[str, ...]
    tokens_per_step: int
    num_scored_rollouts: int
    max_sequence: int
    roles: tuple[Role, ...]
    topologies: tuple[Topology, ...]
    engine: Engine | None
    engine_layout: EngineLayout
    num_engines: int
    engine_nodes: int
    engine_place: EnginePlace
    shares_devices: bool
    phases: tuple[Phase, ...]
    traffic: Traffic | None
    checkpoint: Checkpoint
    num_steps: int | None
    time: StepTime | None

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
        return max(0, self.max_sequence - self.engine.num_cached_tokens) if self.engine else 0

    @property
    def fits(self) -> bool:
        """Whether every phase fits the device, and the engine has a cache to work with."""
        return self.room_bytes >= 0 and not self.cache_shortage_tokens

    @property
    def is_served(self) -> bool:
        """Whether engines are in processes of their own."""
        return self.engine_place is not EnginePlace.IN_RANKS

    @property
    def host_bytes_per_node(self) -> int:
        """Host memory that a node needs in the phase with most of it, if all its ranks need as much as any.

        A node of engines has a copy of the weights that ranks on other nodes write.
        """
        of_ranks = max(phase.most_host_bytes for phase in self.phases) * self.ranks_per_node
        if not self.is_served or self.shares_devices:
            return of_ranks
        engine_ranks = self.engine_layout.tp * self.num_engines // self.engine_nodes
        of_engines = engine_ranks * self.phases[-1].most_host_bytes
        weights_bytes = self.traffic.received_across if self.traffic else 0
        if self.engine_place is EnginePlace.APART:
            return max(of_ranks, of_engines + weights_bytes)
        return of_ranks + of_engines + weights_bytes * (self.num_ranks - self.ranks_per_node) // self.num_ranks


def plan_run(
    c: PPOConfig | SFTConfig,
    roles: tuple[Role, ...],
    device: Device,
    *,
    placer: EnginePlacer = EnginePlacer.COMMAND,
    with_traffic: bool = True,
    num_steps: int | None = None,
) -> RunPlan:
    """Return the plan of a checked config. placer: of engines in processes of their own.

    with_traffic: plan publications too, which takes longest.

    Raises ConfigError for more ranks than any cluster has, and where batches don't come out even.
    """
    ranks, per_node, actor = num_ranks(c), c.trainer.n_gpus_per_node, roles[0]
    if ranks > MAX_RANKS:
        key, allowed = "trainer.nnodes x trainer.n_gpus_per_node", f"a plan is made for up to {MAX_RANKS:,} ranks"
        raise ConfigError([Problem(key, f"{c.trainer.nnodes} x {per_node}", allowed, "fewer nodes")])
    batches = {role.name: batch_plan(c, role) for role in roles if role.is_trained}
    micro_batches = {name: batch.num_accumulation_steps for name, batch in batches.items()}
    sequence, b = actor.scoring.sequence_tokens, actor.dtype_bytes
    engine, split, traffic, served = None, EngineLayout(), None, isinstance(c, PPOConfig) and is_served(c)
    engine_nodes = c.actor_rollout_ref.rollout.nnodes if isinstance(c, PPOConfig) and served else 0
    place = engine_place(c, placer)
    # On CPU nothing is given back, and every process has a share of its own of the machine.
    shares_devices = isinstance(c, PPOConfig) and engines_share_devices(c) and not (served and device.name == CPU)
    if isinstance(c, PPOConfig):
        engine, split = engine_of(c, actor.shape, device), engine_layout(c)
        if with_traffic and served:
            traffic = handed_traffic(actor.shape, actor.layout, split, b, device, engine_nodes * place.is_across)
        elif with_traffic:
            traffic = publish_traffic(actor.shape, actor.layout, split, b, per_node, device)
    examined = examined_ranks(roles, ranks)
    if engine and served:
        handed_bytes = -(-engine.weights_bytes * split.tp // ranks)
        phases = phases_of(roles, batches, engine if shares_devices else None, device, examined, handed_bytes)
        if not shares_devices:
            phases += (engine_phase(engine, device, rank=ranks),)
    else:
        phases = phases_of(roles, batches, engine, device, examined)
    return RunPlan(
        device=device,
        num_ranks=ranks,
        ranks_per_node=per_node,
        batches=batches,
        algorithm=algorithm_lines(c) if isinstance(c, PPOConfig) else (),
        tokens_per_step=batches[actor.name].num_rollouts * sequence,
        num_scored_rollouts=_num_scored_rollouts(c, batches[actor.name]) if isinstance(c, PPOConfig) else 0,
        max_sequence=sequence,
        roles=roles,
        topologies=tuple(topology_of(role, per_node, micro_batches.get(role.name, 1)) for role in roles),
        engine=engine,
        engine_layout=split,
        num_engines=num_engines(c) if isinstance(c, PPOConfig) else 0,
        engine_nodes=engine_nodes,
        engine_place=place,
        shares_devices=shares_devices,
        phases=phases,
        traffic=traffic,
        checkpoint=_checkpoint(actor.shape, b, sum(_state_bytes(role) for role in roles if role.is_trained)),
        num_steps=num_steps,
        time=_time(c, roles, batches, engine, device) if isinstance(c, PPOConfig) and engine else None,
    )


def _time(
    c: PPOConfig, roles: tuple[Role, ...], batches: Mapping[str, BatchPlan], engine: Engine, device: Device
) -> StepTime:
    batch, rollout = batches[roles[0].name], c.actor_rollout_ref.rollout
    return step_time(
        roles,
        batches,
        engine,
        rollout.tensor_model_parallel_size,
        device,
        ranks_per_node=c.trainer.n_gpus_per_node,
        num_engines=num_engines(c),
        num_rollouts=batch.num_rollouts,
        num_scored_rollouts=_num_scored_rollouts(c, batch),
        max_prompt=c.data.max_prompt_length,
        max_response=c.data.max_response_length,
        max_num_seqs=rollout.max_num_seqs,
        epochs=c.actor_rollout_ref.actor.ppo_epochs,
        overlaps=c.trainer.mode != SYNC,
    )


def _num_scored_rollouts(c: PPOConfig, batch: BatchPlan) -> int:
    if c.algorithm.rollout_correction.bypass:
        return 0
    return batch.num_rollouts - (batch.mini_batch_size if reuses_update(c) else 0)


@cache
def _checkpoint(shape: ModelShape, dtype_bytes: int, state_bytes: int) -> Checkpoint:
    tensors = hf_shapes(shape)
    return Checkpoint(_numel(tensors) * dtype_bytes, len(plan_files(tensors, dtype_bytes)), state_bytes)


def _state_bytes(role: Role) -> int:
    """Return the bytes of a role's weights and moments, in float32, of its adapters where these alone are trained."""
    num_trained = _numel(adapter_shapes(role.shape, role.lora)) if role.lora else _num_weights(role.shape)
    return 3 * FP32_BYTES * num_trained


@cache
def _num_weights(shape: ModelShape) -> int:
    return _numel(hf_shapes(shape))


def _numel(tensors: Mapping[str, tuple[int, ...]]) -> int:
    return sum(math.prod(size) for size in tensors.values())


def examined_ranks(roles: tuple[Role, ...], ranks: int) -> tuple[int, ...]:
    """Return the first rank of every kind: ranks of a kind are on the same stages and hold the same of every model."""
    return _first_of_each_kind(tuple(stored_of(role) for role in roles), ranks)


@cache
def _first_of_each_kind(roles: tuple[Stored, ...], ranks: int) -> tuple[int, ...]:
    first: dict[tuple[tuple[int, StaticBytes], ...], int] = {}
    for rank in range(ranks):
        kind = tuple((role.layout.coordinates(rank).pp, role.on(rank)) for role in roles)
        first.setdefault(kind, rank)
    return tuple(first.values())
