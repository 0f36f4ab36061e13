"""The plan of a checked run, and of the same run with another config."""

from __future__ import annotations

from typing import TypeVar

from megarl.checks.run import CheckedRun
from megarl.config.schema import PPOConfig, SFTConfig
from megarl.errors import ConfigError, Problem
from megarl.plan.devices import Device, this_device
from megarl.plan.engine_place import EnginePlacer, engine_place, processes_per_node
from megarl.plan.memory import GIB
from megarl.plan.report import plan_text
from megarl.plan.run_plan import RunPlan, plan_run
from megarl.plan.verdict import verdict_on
from megarl.roles import FindModel, roles_of

C = TypeVar("C", PPOConfig, SFTConfig)

ROLLOUT_MEMORY = "actor_rollout_ref.rollout.gpu_memory_utilization"


def planned(checked: CheckedRun[C], device: Device, placer: EnginePlacer = EnginePlacer.COMMAND) -> RunPlan:
    """Return the plan of a run. placer: of engines in processes of their own."""
    return plan_run(checked.config, checked.roles, device, placer=placer, num_steps=checked.num_steps)


def known_models(checked: CheckedRun[C]) -> FindModel:
    """Return the finder of the models that a checked run has, for other configs of the same models."""
    known = {role.model.key: role.model for role in checked.roles}
    return lambda facts: known.get(facts.key, facts)


def plan_of(checked: CheckedRun[C], config: C, device: Device) -> RunPlan:
    """Return the plan of another config of the same models. Raises ConfigError where its batches are uneven."""
    return plan_run(config, roles_of(config, known_models(checked)), device, with_traffic=False)


def plan_here(checked: CheckedRun[SFTConfig]) -> str:
    """Return the plan of supervised fine-tuning on this machine as text, whether or not it fits."""
    return plan_text(planned(checked, this_device(checked.config.trainer.n_gpus_per_node)))


def fitting_plan(checked: CheckedRun[PPOConfig], placer: EnginePlacer) -> str:
    """Return the plan of a run on this machine as text. placer: of engines in processes of their own.

    Raises ConfigError where it must fit and doesn't.
    """
    config = checked.config
    device = this_device(processes_per_node(config, engine_place(config, placer)))
    plan = planned(checked, device, placer)
    if plan.fits or not config.trainer.plan_must_fit:
        return plan_text(plan)
    verdict = verdict_on(config, plan, lambda c: plan_of(checked, c, device), known_models(checked))
    key, lacks = ROLLOUT_MEMORY, "the engine's KV cache doesn't hold one sequence of the longest kind"
    value: object = config.actor_rollout_ref.rollout.gpu_memory_utilization
    if plan.room_bytes < 0:
        lacks = (
            f"{plan.worst.name} lacks {-plan.room_bytes / GIB:.1f} GiB of the {device.memory_bytes / GIB:.1f} of a rank"
        )
        if plan.worst.name not in ("generate", "publish", "engine"):
            size = checked.actor.update
            assert size is not None
            key, value = size.key, size.value
    fix = str(verdict.changes[0]) if verdict.changes else f"another layout; {'; '.join(verdict.causes)}"
    allowed = f"the plan doesn't fit: {lacks}; python -m megarl.plan with the same arguments shows all of it"
    raise ConfigError([Problem(key, value, allowed, f"{fix}; or trainer.plan_must_fit=false to try all the same")])
