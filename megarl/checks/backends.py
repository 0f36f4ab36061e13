"""Which backend each role has, and what must hold of FSDP's sections.

A role's backend is that of the one section that is there, which the actor's strategy names.
"""

from __future__ import annotations

from collections.abc import Iterator

from megarl.batching.divisors import divisors
from megarl.config.schema import ALL_RANKS, FSDP_STRATEGIES, FsdpConfig, PPOConfig, SFTConfig
from megarl.errors import Absent, Problem
from megarl.roles import Role
from megarl.weights.any_model import head_elsewhere
from megarl.weights.model_shape import CRITIC, FAMILIES, VALUE_HEAD, ModelShape

_ACTOR = "actor_rollout_ref.actor"
_STRATEGY = f"{_ACTOR}.strategy"
_SIZE, _ULYSSES = "fsdp_size", "ulysses_sequence_parallel_size"


def every_role_has_one_backend(c: PPOConfig) -> Iterator[Problem]:
    """The actor has the section of its strategy, and no role has those of both backends."""
    actor, ref, critic, model = c.actor_rollout_ref.actor, c.actor_rollout_ref.ref, c.critic, c.reward.model
    wanted, other = ("fsdp_config", "megatron") if actor.strategy in FSDP_STRATEGIES else ("megatron", "fsdp_config")
    main = {"fsdp_config": "ppo_trainer", "megatron": "ppo_megatron_trainer"}
    if getattr(actor, wanted) is None:
        allowed = f"is missing, which {_STRATEGY} = {actor.strategy} asks for"
        yield Problem(f"{_ACTOR}.{wanted}", Absent(), allowed, f"--config-name={main[wanted]}, whose files have it")
    if getattr(actor, other) is not None:
        allowed = f"{actor.strategy} contradicts {_ACTOR}.{other}, the section of the other backend"
        fix = f"leave {_ACTOR}.{other} out, or --config-name={main[other]} for that backend"
        yield Problem(_STRATEGY, actor.strategy, allowed, fix)
    for key, megatron, fsdp in (
        ("actor_rollout_ref.ref", ref.megatron, ref.fsdp_config),
        ("critic", critic.megatron, critic.fsdp_config),
        ("reward.model", model.megatron, model.fsdp_config),
    ):
        if megatron is not None and fsdp is not None:
            yield Problem(f"{key}.fsdp_config", "a section", f"contradicts {key}.megatron: a role has one backend")


def has_fsdp(c: PPOConfig | SFTConfig) -> bool:
    """Return True where some role may be on FSDP."""
    if isinstance(c, SFTConfig):
        return c.strategy in FSDP_STRATEGIES
    roles = (c.actor_rollout_ref.actor, c.actor_rollout_ref.ref, c.critic, c.reward.model)
    return any(role.fsdp_config is not None for role in roles)


def notes_on_backend(c: PPOConfig | SFTConfig) -> tuple[str, ...]:
    """Return the lines on the backend that a run's start shows, as a tuple of texts."""
    key, section = ("strategy", c) if isinstance(c, SFTConfig) else (_STRATEGY, c.actor_rollout_ref.actor)
    if section.strategy != "fsdp":
        return ()
    return (f"{key} = fsdp: sharded by fully_shard, as fsdp2 is; FSDP1 cuts tensors inside of their rows",)


def shards_and_sequences_divide_the_ranks(key: str, fsdp: FsdpConfig, ranks: int) -> Iterator[Problem]:
    """Copies of the model, and the ranks that share a sequence, are whole numbers of the ranks."""
    sizes = ", ".join(map(str, divisors(ranks)))
    if fsdp.fsdp_size != ALL_RANKS and (fsdp.fsdp_size < 1 or ranks % fsdp.fsdp_size):
        yield Problem(f"{key}.{_SIZE}", fsdp.fsdp_size, f"must divide the {ranks} ranks: {sizes}; or -1, all", "-1")
    if ranks % fsdp.ulysses_sequence_parallel_size:
        allowed = f"must divide the {ranks} ranks: {sizes}"
        yield Problem(f"{key}.{_ULYSSES}", fsdp.ulysses_sequence_parallel_size, allowed)


def parameters_are_gathered(key: str, fsdp: FsdpConfig) -> Iterator[Problem]:
    """What is said of gathered parameters has some."""
    if fsdp.fsdp_size == 1 and not fsdp.reshard_after_forward:
        allowed = f"has no effect where {key}.{_SIZE} is 1: nothing is gathered"
        yield Problem(f"{key}.reshard_after_forward", False, allowed, f"{key}.reshard_after_forward=true")


def a_model_outside_the_map_is_served(role: Role) -> Iterator[Problem]:
    """A family that the name map doesn't have is on FSDP, and has what megarl can do with it there."""
    shape, key = role.shape, role.model.key
    if not isinstance(role.backend, FsdpConfig):
        allowed = f"its architecture {shape.family} trains on FSDP alone; Megatron has {', '.join(FAMILIES)}"
        yield Problem(f"{key}.path", role.model.path, allowed, "--config-name=ppo_trainer; strategy=fsdp2 in main_sft")
        return
    if role.fused_head:
        allowed = f"is for {', '.join(FAMILIES)}: {shape.family} may do more to its logits than its output layer"
        yield Problem(f"{key}.use_fused_kernels", True, allowed, f"{key}.use_fused_kernels=false")
    if shape.own_attention and role.backend.ulysses_sequence_parallel_size > 1:
        allowed = f"must be 1: {shape.family} attends in a way of its own, which can't be split over ranks"
        name = f"{role.backend_key}.{_ULYSSES}"
        yield Problem(name, role.backend.ulysses_sequence_parallel_size, allowed, f"{name}=1")
    if role.name == "critic":
        known, elsewhere = head_elsewhere(role.model.here(), CRITIC, shape)
        if elsewhere:
            allowed = f"its {known} differs at {elsewhere} from {shape.family} with {VALUE_HEAD} on top"
            fix = "algorithm.adv_estimator=grpo, which needs no critic"
            yield Problem(f"{key}.path", role.model.path, allowed, fix)


def sequences_can_be_packed(role: Role, key: str, *, asked: bool) -> Iterator[Problem]:
    """Padding is left out where the model's attention can be told which tokens belong together."""
    shape = role.model.known_shape
    if asked and shape is not None and shape.own_attention:
        allowed = f"has no effect: {shape.family} attends in a way of its own, and its sequences are padded"
        yield Problem(key, True, allowed, f"{key}=false")


def ulysses_splits_the_heads(key: str, shape: ModelShape, fsdp: FsdpConfig) -> Iterator[Problem]:
    """Every rank that shares a sequence attends with as many heads."""
    size, name = fsdp.ulysses_sequence_parallel_size, f"{key}.{_ULYSSES}"
    if shape.num_heads % size:
        yield Problem(name, size, f"must divide the model's {shape.num_heads} attention heads")
    elif shape.num_kv_heads % size and size % shape.num_kv_heads:
        allowed = f"must divide the model's {shape.num_kv_heads} key-value heads, or be a multiple of them"
        yield Problem(name, size, allowed)
