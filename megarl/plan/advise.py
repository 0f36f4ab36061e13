"""Search layouts and offloads for a model and batch, and rank those that fit by the estimated time of a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product

from megarl.config.defaults import value_of
from megarl.config.schema import ALL_RANKS, PPOConfig
from megarl.errors import ConfigError
from megarl.plan.changes import ACTOR, FSDP, MEGATRON, ROLLOUT, Change, changed, is_valid
from megarl.plan.run_plan import RunPlan
from megarl.plan.step_time import StepTime
from megarl.roles import FindModel, num_ranks
from megarl.weights.model_shape import ModelShape

Values = dict[str, object]


@dataclass(frozen=True)
class _Space:
    """What is searched on a backend. section: its key. axes: settings by name in it, no two of which mean the same.

    off: what every candidate starts from. options: what is then switched on, by group, of which one each is taken.
    """

    section: str
    axes: Callable[[PPOConfig, ModelShape], Iterator[Values]]
    off: Values
    options: tuple[tuple[Values, ...], ...]

    def keys(self, settings: Mapping[str, object]) -> Values:
        """Return settings of the section by their whole keys."""
        return {f"{self.section}.{name}": value for name, value in settings.items()}


def _axes_of_megatron(c: PPOConfig, shape: ModelShape) -> Iterator[Values]:
    ranks = num_ranks(c)
    stages = [n for n in (1, 2, 4, 8, 16) if ranks % n == 0 and n <= shape.num_layers]
    experts = [n for n in (1, 4, 8, 16, 32) if ranks % n == 0] if shape.num_experts else [1]
    for tp, pp, ep in product(_within_a_node(c), stages, experts):
        for etp in (None, 1) if shape.num_experts and tp > 1 else (None,):
            yield {
                "tensor_model_parallel_size": tp,
                "pipeline_model_parallel_size": pp,
                "expert_model_parallel_size": ep,
                "expert_tensor_parallel_size": etp,
            }


def _axes_of_fsdp(c: PPOConfig, shape: ModelShape) -> Iterator[Values]:
    ranks = num_ranks(c)
    parts = [ALL_RANKS, *(n for n in (64, 32, 16, 8, 4, 2, 1) if n < ranks and ranks % n == 0)]
    for size, ulysses in product(parts, _within_a_node(c)):
        yield {"fsdp_size": size, "ulysses_sequence_parallel_size": ulysses}


def _within_a_node(c: PPOConfig) -> list[int]:
    return [n for n in (1, 2, 4, 8) if n <= c.trainer.n_gpus_per_node and num_ranks(c) % n == 0]


_ON_MEGATRON = _Space(
    MEGATRON,
    _axes_of_megatron,
    {
        "optimizer_offload": False,
        "optimizer_on_host": False,
        "grad_offload": False,
        "param_offload": False,
        "recompute.granularity": None,
        "recompute.method": None,
        "recompute.num_layers": None,
    },
    (
        (
            {},
            {"optimizer_offload": True, "grad_offload": True},
            {"optimizer_offload": True, "grad_offload": True, "param_offload": True},
            {"optimizer_on_host": True, "grad_offload": True, "param_offload": True},
        ),
        ({}, {"recompute.granularity": "full", "recompute.method": "uniform", "recompute.num_layers": 1}),
    ),
)
_ON_FSDP = _Space(
    FSDP,
    _axes_of_fsdp,
    {
        "optimizer_offload": False,
        "param_offload": False,
        "enable_gradient_checkpointing": False,
        "reshard_after_forward": True,
    },
    (
        ({}, {"optimizer_offload": True}, {"optimizer_offload": True, "param_offload": True}),
        ({}, {"enable_gradient_checkpointing": True}),
        ({}, {"reshard_after_forward": False}),
    ),
)


LEAST_UTILIZATION = 0.3  # of a device, for an engine that still has a cache worth speaking of


@dataclass(frozen=True)
class Advice:
    """A layout that fits."""

    change: Change
    time: StepTime
    room_bytes: int


def advise(
    c: PPOConfig,
    shape: ModelShape,
    again: Callable[[PPOConfig], RunPlan],
    find: FindModel,
    progress: Callable[[int, int], None],
    count: int = 5,
) -> tuple[list[Advice], int]:
    """Return the ``count`` fastest layouts that fit, and how many were tried.

    shape: of the actor. again: plans a config. find: the models of the run. progress: called after each layout of axes
    with how many are done, of how many.
    """
    found: list[Advice] = []
    space = _ON_MEGATRON if c.actor_rollout_ref.actor.fsdp_config is None else _ON_FSDP
    tried, layouts, off = 0, list(_layouts(c, shape, space)), space.keys(space.off)
    for done, layout in enumerate(layouts):
        progress(done, len(layouts))
        if not is_valid(changed(c, layout | off), find):
            continue
        for chosen in product(*space.options):
            values = layout | off | space.keys(dict(item for option in chosen for item in option.items()))
            if not is_valid(candidate := changed(c, values), find):
                continue
            try:
                plan = again(candidate)
            except ConfigError:  # its batches don't come out even
                break
            tried += 1
            if smaller := _smaller_engine(candidate, plan):
                values |= smaller
                candidate = changed(c, values)
                plan = again(candidate)
            if plan.fits:
                assert plan.time is not None, "an RL run has steps"
                kept = {key: value for key, value in values.items() if value_of(c, key) != value}
                found.append(Advice(Change(kept, ""), plan.time, plan.room_bytes))
    progress(len(layouts), len(layouts))
    # Of equal times the one with fewer settings to change.
    found.sort(key=lambda advice: (round(advice.time.total, 1), len(advice.change.values), -advice.room_bytes))
    return found[:count], tried


def _smaller_engine(c: PPOConfig, plan: RunPlan) -> dict[str, object]:
    """Return a smaller share for the engine as a change of the config; empty where that doesn't make the run fit."""
    over = {phase.name: phase.device_bytes - plan.device.memory_bytes for phase in plan.phases}
    awake = over.pop("generate")
    if awake <= 0 or max(over.values()) > 0:
        return {}
    share = c.actor_rollout_ref.rollout.gpu_memory_utilization - awake / plan.device.memory_bytes
    rounded = math.floor(share * 20) / 20
    return {f"{ROLLOUT}.gpu_memory_utilization": rounded} if rounded >= LEAST_UTILIZATION else {}


def _layouts(c: PPOConfig, shape: ModelShape, space: _Space) -> Iterator[Values]:
    """Yield values of the actor's axes, of its micro-batch and of the engine's TP, no two of which mean the same."""
    actor, ranks = c.actor_rollout_ref.actor, num_ranks(c)
    micros = {actor.ppo_micro_batch_size_per_gpu} | (set() if actor.use_dynamic_bsz else {1, 2, 4})
    engines = [n for n in (1, 2, 4, 8, 16) if ranks % n == 0]
    for axes, micro, engine_tp in product(space.axes(c, shape), sorted(micros), engines):
        yield {
            **space.keys(axes),
            f"{ACTOR}.ppo_micro_batch_size_per_gpu": micro,
            f"{ROLLOUT}.tensor_model_parallel_size": engine_tp,
        }
