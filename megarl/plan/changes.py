"""What would make a run fit: changes of its config, tried in the order of what they cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from itertools import combinations
from typing import Any, TypeVar, cast

from megarl.checks.rules import model_problems, run_problems
from megarl.config.defaults import value_of
from megarl.config.schema import ALL_RANKS, FsdpConfig, MegatronConfig, PPOConfig, SFTConfig
from megarl.errors import ConfigError, Problem
from megarl.plan.devices import Device
from megarl.plan.run_plan import RunPlan
from megarl.roles import FindModel, engines_share_devices, roles_of

C = TypeVar("C", PPOConfig, SFTConfig)

ACTOR = "actor_rollout_ref.actor"
MODEL = "actor_rollout_ref.model"
MEGATRON = f"{ACTOR}.megatron"
FSDP = f"{ACTOR}.fsdp_config"
ROLLOUT = "actor_rollout_ref.rollout"
MAX_COMBINED = 3

_OF_CRITIC = {
    f"{ACTOR}.ppo_micro_batch_size_per_gpu": "critic.ppo_micro_batch_size_per_gpu",
    f"{ACTOR}.log_prob_micro_batch_size_per_gpu": "critic.forward_micro_batch_size_per_gpu",
    f"{ACTOR}.use_dynamic_bsz": "critic.use_dynamic_bsz",
    f"{ACTOR}.ppo_max_token_len_per_gpu": "critic.ppo_max_token_len_per_gpu",
    f"{ACTOR}.log_prob_max_token_len_per_gpu": "critic.forward_max_token_len_per_gpu",
}


@dataclass(frozen=True)
class Change:
    """Some keys with new values. cost: in words, for people."""

    values: Mapping[str, object]
    cost: str

    def __str__(self) -> str:
        return " ".join(f"{key}={typed(value)}" for key, value in self.values.items())


def typed(value: object) -> str:
    """Return a value as it is typed on the command line."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def changed(config: C, values: Mapping[str, object]) -> C:
    """Return ``config`` with some keys changed; what takes its value from the actor's, and so has it, follows."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        before = value_of(config, key)
        followers: list[str] = [f for f in _followers(key) if f not in values and _value_if_there(config, f) == before]
        for name in (key, *followers):
            sections: list[str] = name.split(".")
            node = tree
            for section in sections[:-1]:
                node = node.setdefault(section, {})
            node[sections[-1]] = value
    return cast(C, _replaced(config, tree))


def _followers(key: str) -> Iterator[str]:
    """Yield the keys that megarl's own configs set to the value of ``key``."""
    for section, frozen in ((MEGATRON, MegatronConfig), (FSDP, FsdpConfig)):
        if key.startswith(f"{section}."):
            name = key.removeprefix(f"{ACTOR}.")
            yield f"critic.{name}"
            if name.split(".")[1] in {field.name for field in fields(frozen)}:
                yield f"actor_rollout_ref.ref.{name}"
                yield f"reward.model.{name}"
    if key in _OF_CRITIC:
        yield _OF_CRITIC[key]


def _value_if_there(config: object, key: str) -> Any:
    """Return the value of a dotted key, None where it is in a section that isn't there."""
    for name in key.split("."):
        config = getattr(config, name, None)
    return config


def _replaced(config: Any, tree: Mapping[str, Any]) -> Any:
    """Return a section with new values; a mapping in ``tree`` is a section in it."""
    return replace(
        config,
        **{name: _replaced(getattr(config, name), new) if isinstance(new, dict) else new for name, new in tree.items()},
    )


def single_changes(c: PPOConfig | SFTConfig, plan: RunPlan) -> Iterator[Change]:
    """Yield what may save memory, cheapest first; what is so already is left out."""
    is_rl, is_fsdp = isinstance(c, PPOConfig), plan.roles[0].layout.is_fsdp
    section = (FSDP if is_fsdp else MEGATRON) if is_rl else ("fsdp_config" if is_fsdp else "megatron")
    wanted = [] if is_fsdp else [Change({f"{section}.use_distributed_optimizer": True}, "nothing")]
    if isinstance(c, PPOConfig) and engines_share_devices(c):
        wanted.append(Change({f"{ROLLOUT}.free_cache_engine": True}, "allocating the engine's memory twice a step"))
    if not is_fsdp:
        wanted.append(Change({f"{section}.grad_offload": True}, "allocating gradients again each update"))
    wanted += [
        Change({f"{section}.optimizer_offload": True}, "moving optimizer state twice a step"),
        Change({f"{section}.param_offload": True}, "moving parameters for each use"),
        *(_of_rollouts(c, plan) if isinstance(c, PPOConfig) else _of_examples(c)),
        Change({f"{MODEL if is_rl else 'model'}.use_fused_kernels": True}, "logits computed twice in updates"),
    ]
    node = c.trainer.n_gpus_per_node
    wanted += _on_fsdp(section) if is_fsdp else _on_megatron(section, c)
    if is_rl:
        wanted += _doubled(f"{ROLLOUT}.tensor_model_parallel_size", c, node, "slower tokens, fewer replicas")
    if not is_fsdp:
        wanted += _doubled(f"{section}.pipeline_model_parallel_size", c, plan.num_ranks, "waiting stages")
    for change in wanted:
        if any(value_of(c, key) != value for key, value in change.values.items()):
            yield change


def _doubled(key: str, c: PPOConfig | SFTConfig, most: int, cost: str) -> Iterator[Change]:
    """Yield the twofold, fourfold ... of a size, up to ``most``."""
    size = value_of(c, key)
    while (size := size * 2) <= most:
        yield Change({key: size}, cost)


def _of_examples(c: SFTConfig) -> Iterator[Change]:
    """Yield smaller micro-batches of supervised fine-tuning."""
    micro = c.data.micro_batch_size_per_gpu
    while (micro := micro // 2) >= 1:
        yield Change({"data.micro_batch_size_per_gpu": micro}, "smaller matrix products")


def _of_rollouts(c: PPOConfig, plan: RunPlan) -> Iterator[Change]:
    """Yield smaller shares of the engine, and smaller micro-batches of an RL run."""
    models = c.actor_rollout_ref
    for share in (0.8, 0.7, 0.6, 0.5, 0.4, 0.3):
        if share < models.rollout.gpu_memory_utilization:
            yield Change({f"{ROLLOUT}.gpu_memory_utilization": share}, "fewer responses at once")
    micro = models.actor.ppo_micro_batch_size_per_gpu
    while micro > 1:
        micro //= 2
        sizes = {f"{ACTOR}.ppo_micro_batch_size_per_gpu": micro}
        scored = models.actor.log_prob_micro_batch_size_per_gpu
        if scored is not None and scored > micro:
            sizes[f"{ACTOR}.log_prob_micro_batch_size_per_gpu"] = micro
        critics = c.critic.ppo_micro_batch_size_per_gpu
        if "critic" in plan.batches and critics > micro and critics != models.actor.ppo_micro_batch_size_per_gpu:
            sizes["critic.ppo_micro_batch_size_per_gpu"] = micro
        yield Change(sizes, "smaller matrix products")
    update = plan.roles[0].update
    assert update is not None
    tokens = update.value if update.max_tokens is not None else 0
    while (tokens := tokens // 2) >= update.least_value:
        yield Change({update.key: tokens}, "smaller matrix products")


def _on_fsdp(section: str) -> Iterator[Change]:
    """Yield what may save memory on FSDP alone."""
    yield Change({f"{section}.reshard_after_forward": True}, "gathering parameters twice in updates")
    yield Change({f"{section}.enable_gradient_checkpointing": True}, "a third more work in updates")
    yield Change({f"{section}.fsdp_size": ALL_RANKS}, "gathering parameters from all nodes")


def _on_megatron(section: str, c: PPOConfig | SFTConfig) -> Iterator[Change]:
    """Yield what may save memory on Megatron alone."""
    full = {"granularity": "full", "method": "uniform", "num_layers": 1}
    recompute = {f"{section}.recompute.{name}": value for name, value in full.items()}
    yield Change(recompute, "a third more work in updates")
    on_host = {f"{section}.optimizer_on_host": True, f"{section}.optimizer_offload": False}
    yield Change(on_host, "Adam at the host's speed")
    node = c.trainer.n_gpus_per_node
    yield from _doubled(f"{section}.tensor_model_parallel_size", c, node, "more exchange between ranks")


def fitting_changes(
    c: C, plan: RunPlan, again: Callable[[C], RunPlan], find: FindModel, count: int = 3
) -> list[Change]:
    """Return the cheapest ``count`` changes, alone or together, after which the run fits.

    again: plans a config. find: the models of the run.
    """
    singles = list(single_changes(c, plan))
    found: list[Change] = []
    for size in range(1, MAX_COMBINED + 1):
        for parts in combinations(singles, size):
            values = {key: value for part in parts for key, value in part.values.items()}
            if len(values) < sum(len(part.values) for part in parts):
                continue  # two values of one key
            if any(set(known.values) <= set(values) for known in found):
                continue  # more than needed, or more of the same
            if not is_valid(candidate := changed(c, values), find):
                continue
            try:
                fits = again(candidate).fits
            except ConfigError:  # its batches don't come out even
                continue
            if fits:
                found.append(Change(values, "; ".join(dict.fromkeys(part.cost for part in parts))))
                if len(found) == count:
                    return found
    return found


def is_valid(c: PPOConfig | SFTConfig, find: FindModel) -> bool:
    """Return True for a config that breaks no rule of its own nor of its models."""
    roles = roles_of(c, find)
    return not run_problems(c, roles) and not model_problems(c, roles)


def device_with_memory(device: Device, memory_gib: float | None) -> Device:
    """Return ``device`` with another size of memory, as given in GiB. Raises ConfigError where that is none."""
    if memory_gib is not None and not 0 < memory_gib < math.inf:
        raise ConfigError([Problem("--gpu-memory", memory_gib, "must be above 0", "--gpu-memory=80")])
    return device if memory_gib is None else replace(device, memory_bytes=int(memory_gib * 2**30))
