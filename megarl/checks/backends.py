"""Which backend each role has: that of the one section that is there, which the actor's strategy names."""

from __future__ import annotations

from collections.abc import Iterator

from megarl.config.schema import FSDP_STRATEGIES, PPOConfig
from megarl.errors import Absent, Problem

_ACTOR = "actor_rollout_ref.actor"


def every_role_has_one_backend(c: PPOConfig) -> Iterator[Problem]:
    """The actor has the section of its strategy, and no role has those of both backends."""
    actor, ref, critic, model = c.actor_rollout_ref.actor, c.actor_rollout_ref.ref, c.critic, c.reward.model
    wanted, other = ("fsdp_config", "megatron") if actor.strategy in FSDP_STRATEGIES else ("megatron", "fsdp_config")
    main = {"fsdp_config": "ppo_trainer", "megatron": "ppo_megatron_trainer"}
    if getattr(actor, wanted) is None:
        allowed = f"is missing, which {_ACTOR}.strategy = {actor.strategy} asks for"
        yield Problem(f"{_ACTOR}.{wanted}", Absent(), allowed, f"--config-name={main[wanted]}, whose files have it")
    if getattr(actor, other) is not None:
        allowed = f"{actor.strategy} contradicts {_ACTOR}.{other}, the section of the other backend"
        fix = f"leave {_ACTOR}.{other} out, or --config-name={main[other]} for that backend"
        yield Problem(f"{_ACTOR}.strategy", actor.strategy, allowed, fix)
    for key, megatron, fsdp in (
        ("actor_rollout_ref.ref", ref.megatron, ref.fsdp_config),
        ("critic", critic.megatron, critic.fsdp_config),
        ("reward.model", model.megatron, model.fsdp_config),
    ):
        if megatron is not None and fsdp is not None:
            yield Problem(f"{key}.fsdp_config", "a section", f"contradicts {key}.megatron: a role has one backend")
