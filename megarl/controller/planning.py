"""The plan of a checked run, and of the same run with another config."""

from __future__ import annotations

from megarl.config.schema import PPOConfig
from megarl.controller.check import CheckedPPO, actor_batch, critic_batch
from megarl.plan.devices import Device
from megarl.plan.run_plan import RunPlan, plan_run


def planned(checked: CheckedPPO, device: Device) -> RunPlan:
    """Return the plan of a run."""
    critic = checked.critic.shape if checked.critic else None
    return plan_run(checked.config, checked.model.shape, critic, checked.batch, checked.critic_batch, device)


def plan_of(checked: CheckedPPO, config: PPOConfig, device: Device) -> RunPlan:
    """Return the plan of another config of the same models. Raises ConfigError where its batches are uneven."""
    critic = checked.critic.shape if checked.critic else None
    batches = actor_batch(config), critic_batch(config) if critic else None
    return plan_run(config, checked.model.shape, critic, *batches, device, with_traffic=False)
