"""What would make a run fit: changes of its config, tried in the order of what they cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from itertools import combinations
from typing import Any, cast

from megarl.checks.rules import model_problems, run_problems
from megarl.config.schema import ALL_RANKS, FsdpConfig, MegatronConfig, PPOConfig
from megarl.errors import ConfigError, Problem
from megarl.plan.devices import Device
from megarl.plan.run_plan import RunPlan
from megarl.roles import FindModel, roles_of

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
        return " ".join(f"{key}={_typed(value)}" for key, value in self.values.items())


def _typed(value: object) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def changed(config: PPOConfig, values: Mapping[str, object]) -> PPOConfig:
    """Return ``config`` with some keys changed; what takes its value from the actor's, and so has it, follows."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        before = value_of(config, key)
        followers = [f for f in _followers(key) if f not in values and value_of(config, f, None) == before]
        for name in (key, *followers):
            *sections, last = name.split(".")
            node = tree
            for section in sections:
                node = node.setdefault(section, {})
            node[last] = value
    return cast(PPOConfig, _replaced(config, tree))


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


def value_of(config: object, key: str, *default: Any) -> Any:
    """Return the value of a dotted key; the ``default``, if given, where it is in a section that isn't there."""
    for name in key.split("."):
        config = getattr(config, name, *default)
    return config


def _replaced(config: Any, tree: Mapping[str, Any]) -> Any:
    """Return a section with new values; a mapping in ``tree`` is a section in it."""
    return replace(
        config,
        **{name: _replaced(getattr(config, name), new) if isinstance(new, dict) else new for name, new in tree.items()},
    )


def single_changes(c: PPOConfig, plan: RunPlan) -> Iterator[Change]:
    """Yield what may save memory, cheapest first; what is so already is left out."""
    models = c.actor_rollout_ref
    is_fsdp, section = plan.roles[0].layout.is_fsdp, plan.roles[0].backend_key
    wanted = [Change({f"{ROLLOUT}.free_cache_engine": True}, "moving the engine's weights twice a step")]
    if not is_fsdp:
        wanted.insert(0, Change({f"{MEGATRON}.use_distributed_optimizer": True}, "nothing"))
        wanted.append(Change({f"{MEGATRON}.grad_offload": True}, "allocating gradients again each update"))
    wanted += [
        Change({f"{section}.optimizer_offload": True}, "moving optimizer state twice a step"),
        Change({f"{section}.param_offload": True}, "moving parameters for each use"),
    ]
    for share in (0.8, 0.7, 0.6, 0.5, 0.4, 0.3):
        if share < models.rollout.gpu_memory_utilization:
            wanted.append(Change({f"{ROLLOUT}.gpu_memory_utilization": share}, "fewer responses at once"))
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
        wanted.append(Change(sizes, "smaller matrix products"))
    update = plan.roles[0].update
    assert update is not None
    tokens = update.value if update.max_tokens is not None else 0
    while (tokens := tokens // 2) >= update.least_value:
        wanted.append(Change({update.key: tokens}, "smaller matrix products"))
    wanted.append(Change({f"{MODEL}.use_fused_kernels": True}, "logits computed twice in updates"))
    wanted += _on_fsdp() if is_fsdp else _on_megatron(c, plan)
    engine_tp = models.rollout.tensor_model_parallel_size
    while (engine_tp := engine_tp * 2) <= c.trainer.n_gpus_per_node:
        wanted.append(Change({f"{ROLLOUT}.tensor_model_parallel_size": engine_tp}, "slower tokens, fewer replicas"))
    for change in wanted:
        if any(value_of(c, key) != value for key, value in change.values.items()):
            yield change


def _on_fsdp() -> Iterator[Change]:
    """Yield what may save memory on FSDP alone."""
    yield Change({f"{FSDP}.reshard_after_forward": True}, "gathering parameters twice in updates")
    yield Change({f"{FSDP}.enable_gradient_checkpointing": True}, "a third more work in updates")
    yield Change({f"{FSDP}.fsdp_size": ALL_RANKS}, "gathering parameters from all nodes")


def _on_megatron(c: PPOConfig, plan: RunPlan) -> Iterator[Change]:
    """Yield what may save memory on Megatron alone."""
    full = {"granularity": "full", "method": "uniform", "num_layers": 1}
    recompute = {f"{MEGATRON}.recompute.{name}": value for name, value in full.items()}
    yield Change(recompute, "a third more work in updates")
    on_host = {f"{MEGATRON}.optimizer_on_host": True, f"{MEGATRON}.optimizer_offload": False}
    yield Change(on_host, "Adam at the host's speed")
    tp = value_of(c, f"{MEGATRON}.tensor_model_parallel_size")
    while (tp := tp * 2) <= c.trainer.n_gpus_per_node:
        yield Change({f"{MEGATRON}.tensor_model_parallel_size": tp}, "more exchange between ranks")
    pp = value_of(c, f"{MEGATRON}.pipeline_model_parallel_size")
    while (pp := pp * 2) <= plan.num_ranks:
        yield Change({f"{MEGATRON}.pipeline_model_parallel_size": pp}, "waiting stages")


def fitting_changes(
    c: PPOConfig, plan: RunPlan, again: Callable[[PPOConfig], RunPlan], find: FindModel, count: int = 3
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


def is_valid(c: PPOConfig, find: FindModel) -> bool:
    """Return True for a config that breaks no rule of its own nor of its models."""
    roles = roles_of(c, find)
    return not run_problems(c, roles) and not model_problems(c, roles)


def device_with_memory(device: Device, memory_gib: float | None) -> Device:
    """Return ``device`` with another size of memory, as given in GiB. Raises ConfigError where that is none."""
    if memory_gib is not None and not 0 < memory_gib < math.inf:
        raise ConfigError([Problem("--gpu-memory", memory_gib, "must be above 0", "--gpu-memory=80")])
    return device if memory_gib is None else replace(device, memory_bytes=int(memory_gib * 2**30))
