"""What must hold of low-rank adapters."""

from __future__ import annotations

from collections.abc import Iterator

from megarl.config.defaults import default_of
from megarl.config.schema import ModelConfig
from megarl.errors import Problem, nearest
from megarl.roles import Role
from megarl.weights.adapters import ALL_LINEAR, adapted_modules, linear_modules


def adapters_are_asked_for(key: str, model: ModelConfig) -> Iterator[Problem]:
    """What is said of adapters acts on some. key: of the model's section."""
    if model.lora_rank > 0:
        return
    words, fix = f"has an effect only where {key}.lora_rank is above 0", f"{key}.lora_rank=16"
    if model.lora_alpha != default_of("actor_rollout_ref.model.lora_alpha"):
        yield Problem(f"{key}.lora_alpha", model.lora_alpha, words, fix)
    if list(model.target_modules) != default_of("actor_rollout_ref.model.target_modules"):
        yield Problem(f"{key}.target_modules", list(model.target_modules), words, fix)


def adapters_have_modules(key: str, model: ModelConfig) -> Iterator[Problem]:
    """Adapters are of at least one module. key: of the model's section."""
    if model.lora_rank > 0 and not model.target_modules:
        name = f"{key}.target_modules"
        yield Problem(name, [], "must name a module, or all-linear", f"{name}=all-linear")


def adapters_are_on_fsdp(role: Role) -> Iterator[Problem]:
    """Megatron trains whole models."""
    if role.lora and not role.layout.is_fsdp:
        key = f"{role.model.key}.lora_rank"
        allowed = "has adapters on FSDP only, and this role is on Megatron"
        yield Problem(key, role.lora.rank, allowed, f"--config-name=ppo_trainer or strategy=fsdp2, or {key}=0")


def adapted_modules_exist(role: Role) -> Iterator[Problem]:
    """Every target is a linear module of the layers."""
    if role.lora is None:
        return
    ends = dict.fromkeys(name.rpartition(".")[2] for name in linear_modules(role.shape))
    for target in role.lora.targets:
        if not adapted_modules(role.shape, (target,)):
            allowed = f"is no linear module of {role.shape.family}'s layers: {', '.join(ends)}, or all-linear"
            yield Problem(f"{role.model.key}.target_modules", target, allowed, nearest(target, (*ends, ALL_LINEAR)))
