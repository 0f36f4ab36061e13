"""Search layouts and offloads for a model and batch, and rank those that fit by the estimated time of a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product

from megarl.config.defaults import value_of
from megarl.config.schema import PPOConfig
from megarl.errors import ConfigError
from megarl.plan.changes import ACTOR, MEGATRON, ROLLOUT, Change, changed, is_valid
from megarl.plan.run_plan import RunPlan
from megarl.plan.step_time import StepTime, step_time
from megarl.roles import FindModel, num_ranks
from megarl.weights.model_shape import ModelShape

_OFFLOADS: tuple[dict[str, object], ...] = (
    {},
    {"optimizer_offload": True, "grad_offload": True},
    {"optimizer_offload": True, "grad_offload": True, "param_offload": True},
    {"optimizer_on_host": True, "grad_offload": True, "param_offload": True},
)
_RECOMPUTE: tuple[dict[str, object], ...] = (
    {},
    {"recompute.granularity": "full", "recompute.method": "uniform", "recompute.num_layers": 1},
)


def _in_megatron(settings: Mapping[str, object]) -> dict[str, object]:
    """Return settings of the actor's axes by their whole keys."""
    return {f"{MEGATRON}.{name}": value for name, value in settings.items()}


_OFF = _in_megatron(
    {
        "optimizer_offload": False,
        "optimizer_on_host": False,
        "grad_offload": False,
        "param_offload": False,
        "recompute.granularity": None,
        "recompute.method": None,
        "recompute.num_layers": None,
    }
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
    tried, layouts = 0, list(_layouts(c, shape))
    for done, layout in enumerate(layouts):
        progress(done, len(layouts))
        if not is_valid(changed(c, layout | _OFF), find):
            continue
        for offload, recompute in product(_OFFLOADS, _RECOMPUTE):
            values = layout | _OFF | _in_megatron(offload | recompute)
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
                kept = {key: value for key, value in values.items() if value_of(c, key) != value}
                found.append(Advice(Change(kept, ""), _time(candidate, plan), plan.room_bytes))
    progress(len(layouts), len(layouts))
    # Of equal times the one with fewer settings to change.
    found.sort(key=lambda advice: (round(advice.time.total, 1), len(advice.change.values), -advice.room_bytes))
    return found[:count], tried


def _smaller_engine(c: PPOConfig, plan: RunPlan) -> dict[str, object]:
    """Return a smaller share for the engine as a change of the config; empty where that doesn't make the run fit."""
    over = {phase.name: phase.device_bytes - plan.device.memory_bytes for phase in plan.phases}
    awake = max(over.pop("generate"), over.pop("publish"))
    if awake <= 0 or max(over.values()) > 0:
        return {}
    share = c.actor_rollout_ref.rollout.gpu_memory_utilization - awake / plan.device.memory_bytes
    rounded = math.floor(share * 20) / 20
    return {f"{ROLLOUT}.gpu_memory_utilization": rounded} if rounded >= LEAST_UTILIZATION else {}


def _layouts(c: PPOConfig, shape: ModelShape) -> Iterator[dict[str, object]]:
    """Yield values of the actor's axes, of its micro-batch and of the engine's TP, no two of which mean the same."""
    ranks, node = num_ranks(c), c.trainer.n_gpus_per_node
    within = [n for n in (1, 2, 4, 8) if n <= node and ranks % n == 0]
    stages = [n for n in (1, 2, 4, 8, 16) if ranks % n == 0 and n <= shape.num_layers]
    experts = [n for n in (1, 4, 8, 16, 32) if ranks % n == 0] if shape.num_experts else [1]
    micros = sorted({1, 2, 4, c.actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu})
    engines = [n for n in (1, 2, 4, 8, 16) if ranks % n == 0]
    for tp, pp, ep, micro, engine_tp in product(within, stages, experts, micros, engines):
        for etp in (None, 1) if shape.num_experts and tp > 1 else (None,):
            axes = {
                "tensor_model_parallel_size": tp,
                "pipeline_model_parallel_size": pp,
                "expert_model_parallel_size": ep,
                "expert_tensor_parallel_size": etp,
            }
            yield {
                **_in_megatron(axes),
                f"{ACTOR}.ppo_micro_batch_size_per_gpu": micro,
                f"{ROLLOUT}.tensor_model_parallel_size": engine_tp,
            }


def _time(c: PPOConfig, plan: RunPlan) -> StepTime:
    engine = plan.engine
    assert engine is not None, "an RL run has an engine"
    return step_time(
        plan.roles,
        plan.batches,
        engine,
        plan.engine_tp,
        plan.device,
        ranks_per_node=plan.ranks_per_node,
        num_rollouts=plan.batches[plan.roles[0].name].num_rollouts,
        num_scored_rollouts=plan.num_scored_rollouts,
        max_prompt=c.data.max_prompt_length,
        max_response=c.data.max_response_length,
        max_num_seqs=c.actor_rollout_ref.rollout.max_num_seqs,
        epochs=c.actor_rollout_ref.actor.ppo_epochs,
    )
