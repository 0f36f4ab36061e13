"""What is said of a run that doesn't fit: changes that make it fit, or what takes the most and what decides it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from megarl.config.defaults import value_of
from megarl.config.schema import (
    FsdpConfig,
    MegatronConfig,
    PPOConfig,
    SFTConfig,
    TrainedFsdpConfig,
    TrainedMegatronConfig,
)
from megarl.plan.changes import ROLLOUT, Change, fitting_changes, typed
from megarl.plan.memory import GIB, Phase
from megarl.plan.run_plan import RunPlan
from megarl.roles import FindModel, Role, role_named

C = TypeVar("C", PPOConfig, SFTConfig)

_AXES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size")
_NUM_CAUSES = 3


@dataclass(frozen=True)
class Verdict:
    """On a run that doesn't fit. causes: sentences, where there are no changes."""

    changes: tuple[Change, ...]
    causes: tuple[str, ...]


def verdict_on(c: C, plan: RunPlan, again: Callable[[C], RunPlan], find: FindModel) -> Verdict:
    """Return the Verdict on a plan that doesn't fit. again: plans a config. find: the models of the run."""
    changes = fitting_changes(c, plan, again, find)
    return Verdict(tuple(changes), () if changes else tuple(causes_of(c, plan)))


def causes_of(c: PPOConfig | SFTConfig, plan: RunPlan) -> Iterator[str]:
    """Yield what takes the most in the phases that don't fit, each with the settings that decide its size."""
    most: dict[str, tuple[int, Phase]] = {}
    for phase in (phase for phase in plan.phases if phase.device_bytes > plan.device.memory_bytes):
        for item in phase.items:
            if item.device_bytes > most.get(item.name, (0, phase))[0]:
                most[item.name] = (item.device_bytes, phase)
    for name, (size, phase) in sorted(most.items(), key=lambda entry: -entry[1][0])[:_NUM_CAUSES]:
        settings = ", ".join(f"{key} = {typed(value)}" for key, value in _deciding(c, plan.roles, name, phase))
        yield f"{name}: {size / GIB:.1f} GiB in {phase.name}" + (f"; {settings}" if settings else "")
    if isinstance(c, PPOConfig) and role_named(plan.roles, "critic"):
        size = sum(item.device_bytes for item in plan.worst.items if item.name.startswith("critic "))
        estimator = c.algorithm.adv_estimator
        yield (
            f"the critic: {size / GIB:.1f} GiB in {plan.worst.name}; it is there because algorithm.adv_estimator = "
            f"{estimator}, while grpo and others need none"
        )


def _deciding(c: PPOConfig | SFTConfig, roles: Sequence[Role], item: str, phase: Phase) -> Iterator[tuple[str, object]]:
    """Yield the keys that decide the size of an item, with their values."""
    if item.startswith("engine"):
        names = ("gpu_memory_utilization",) if "cache" in item else ()
        for key in (f"{ROLLOUT}.{name}" for name in ("tensor_model_parallel_size", *names)):
            yield key, value_of(c, key)
        return
    at_work = phase.name.partition(" ")[0]
    role = next((r for r in roles if item.startswith(f"{r.name} ")), None)
    is_kept = role is not None
    role = role or next((r for r in roles if r.name == at_work), None)
    if role is None:
        return
    for name in _deciding_in_section(role, item, is_kept):
        yield f"{role.backend_key}.{name}", value_of(role.backend, name)
    if not is_kept:
        size = role.update if phase.name.endswith("update") and role.update else role.scoring
        yield size.key, size.value


def _deciding_in_section(role: Role, item: str, is_kept: bool) -> tuple[str, ...]:
    """Return the names of the settings in the role's section of a backend that decide an item."""
    if isinstance(role.backend, MegatronConfig):
        return _deciding_on_megatron(role, role.backend, item, is_kept)
    return _deciding_on_fsdp(role.backend, item, is_kept)


def _deciding_on_fsdp(backend: FsdpConfig, item: str, is_kept: bool) -> tuple[str, ...]:
    """Return the names of the settings that decide an item of a role on FSDP."""
    if is_kept:
        moves = ("param_offload",) if "parameters" in item else ("optimizer_offload",) if "optimizer" in item else ()
        return ("fsdp_size", *moves)
    if item == "gathered parameters":
        return ("reshard_after_forward",)
    again = ("enable_gradient_checkpointing",) if isinstance(backend, TrainedFsdpConfig) else ()
    return ("ulysses_sequence_parallel_size", *again)


def _deciding_on_megatron(role: Role, backend: MegatronConfig, item: str, is_kept: bool) -> tuple[str, ...]:
    """Return the names of the settings that decide an item of a role on Megatron."""
    axes = _AXES if role.shape.num_experts else _AXES[:2]
    moves: tuple[str, ...] = ("param_offload",) if "parameters" in item else ()
    if isinstance(backend, TrainedMegatronConfig):
        if "optimizer" in item:
            moves = ("use_distributed_optimizer", "optimizer_offload")
        elif "gradients" in item:
            moves = ("grad_offload",)
        elif not is_kept:
            moves = ("recompute.granularity",)
    return (*axes, *moves)
