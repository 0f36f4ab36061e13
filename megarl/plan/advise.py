"""Search layouts and offloads for a model and batch, and rank those that fit by the estimated time of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

from megarl.config.megatron_rules import the_model_fits_its_axes
from megarl.config.model_shape import ModelShape
from megarl.config.rules import num_ranks, ppo_model_problems, ppo_problems
from megarl.config.schema import PPOConfig
from megarl.errors import ConfigError
from megarl.plan.changes import ACTOR, MEGATRON, ROLLOUT, Change, changed
from megarl.plan.run_plan import RunPlan
from megarl.plan.step_time import StepTime, step_time

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
_OFF: dict[str, object] = {
    "optimizer_offload": False,
    "optimizer_on_host": False,
    "grad_offload": False,
    "param_offload": False,
    "recompute.granularity": None,
    "recompute.method": None,
    "recompute.num_layers": None,
}


@dataclass(frozen=True)
class Advice:
    """A layout that fits."""

    change: Change
    time: StepTime
    room_bytes: int


def advise(
    c: PPOConfig, shape: ModelShape, again: Callable[[PPOConfig], RunPlan], count: int = 5
) -> tuple[list[Advice], int]:
    """Return the ``count`` fastest layouts that fit, and how many were tried. again: plans a config."""
    found: list[Advice] = []
    tried = 0
    for values in _candidates(c, shape):
        candidate = changed(c, values)
        critic = the_model_fits_its_axes("critic.megatron", shape, candidate.critic.megatron)
        if any((*ppo_problems(candidate), *ppo_model_problems(candidate, shape), *critic)):
            continue
        try:
            plan = again(candidate)
        except ConfigError:  # its batches don't come out even
            continue
        tried += 1
        if plan.fits:
            kept = {key: value for key, value in values.items() if _differs(c, key, value)}
            found.append(Advice(Change(kept, ""), _time(candidate, plan), plan.room_bytes))
    # Of equal times the one with fewer settings to change.
    found.sort(key=lambda advice: (round(advice.time.total, 1), len(advice.change.values), -advice.room_bytes))
    return found[:count], tried


def _differs(c: PPOConfig, key: str, value: object) -> bool:
    current: object = c
    for name in key.split("."):
        current = getattr(current, name)
    return current != value


def _candidates(c: PPOConfig, shape: ModelShape) -> Iterator[dict[str, object]]:
    """Yield values of the actor's axes, offloads, recomputation, micro-batch and of the engine's TP."""
    ranks, node = num_ranks(c), c.trainer.n_gpus_per_node
    within = [n for n in (1, 2, 4, 8) if n <= node and ranks % n == 0]
    stages = [n for n in (1, 2, 4, 8, 16) if ranks % n == 0 and n <= shape.num_layers]
    experts: list[tuple[int, int | None]] = [(1, None)]
    if shape.num_experts:
        experts = [(ep, etp) for ep in (1, 4, 8, 16, 32) if ranks % ep == 0 for etp in (1, None)]
    micros = sorted({1, 2, 4, c.actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu})
    for tp, pp, (ep, etp), micro, engine_tp in product(within, stages, experts, micros, within):
        for offload, recompute in product(_OFFLOADS, _RECOMPUTE):
            axes = {
                "tensor_model_parallel_size": tp,
                "pipeline_model_parallel_size": pp,
                "expert_model_parallel_size": ep,
                "expert_tensor_parallel_size": etp,
                **_OFF,
                **offload,
                **recompute,
            }
            yield {
                **{f"{MEGATRON}.{name}": value for name, value in axes.items()},
                f"{ACTOR}.ppo_micro_batch_size_per_gpu": micro,
                f"{ROLLOUT}.tensor_model_parallel_size": engine_tp,
            }


def _time(c: PPOConfig, plan: RunPlan) -> StepTime:
    return step_time(
        plan.roles,
        plan.engine,
        plan.engine_tp,
        plan.device,
        ranks_per_node=plan.ranks_per_node,
        num_rollouts=plan.batch.num_rollouts,
        max_prompt=c.data.max_prompt_length,
        max_response=c.data.max_response_length,
        max_num_seqs=c.actor_rollout_ref.rollout.max_num_seqs,
        epochs=c.actor_rollout_ref.actor.ppo_epochs,
    )
