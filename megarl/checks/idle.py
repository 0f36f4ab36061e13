"""Settings that are given and do nothing in a run: listed where it starts, errors where ``trainer.strict`` is true.

Users switch estimators with one override and keep their file, so that most files have some.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

from megarl.algorithm.needs import (
    KEYS_OF_ESTIMATORS,
    estimator_needs,
    needs_critic,
    needs_reference,
    needs_reward_model,
)
from megarl.catalog import ESTIMATORS, POLICY_LOSSES
from megarl.checks.adapters import adapters_are_asked_for
from megarl.checks.axes import (
    buckets_are_reduced_early,
    chunks_take_turns_on_a_pipeline,
    moments_of_16_bits_are_those_of_an_optimizer_that_has_them,
    recomputation_has_layers_to_pick,
    what_is_said_of_experts_has_some,
)
from megarl.checks.backends import parameters_are_gathered, sequences_can_be_packed
from megarl.checks.effects import settings_have_an_effect
from megarl.checks.rules import without_followers
from megarl.config.defaults import default_of, defaults_in, value_of
from megarl.config.programs import MEGATRON, PPO
from megarl.config.router_losses import router_losses_are_added
from megarl.config.schema import FsdpConfig, MegatronConfig, PPOConfig, SFTConfig, TrainedMegatronConfig
from megarl.errors import Problem
from megarl.roles import CRITIC, REF, REWARD_MODEL, Role

Problems = Iterator[Problem]


def idle_settings(c: PPOConfig | SFTConfig, roles: Sequence[Role]) -> list[Problem]:
    """Return the settings of a run that do nothing, one a key, each with why and with what would make it act."""
    problems = [p for rule in _PPO_RULES for p in rule(c)] if isinstance(c, PPOConfig) else []
    model = c.actor_rollout_ref.model if isinstance(c, PPOConfig) else c.model
    problems += adapters_are_asked_for(roles[0].model.key, model)
    if isinstance(c, PPOConfig):
        problems += an_engine_has_experts_to_spread(c, roles[0])
    for role in roles:
        key = f"{roles[0].model.key}.use_remove_padding"
        problems += sequences_can_be_packed(role, key, asked=model.use_remove_padding)
        problems += the_last_learning_rate_is_that_of_a_schedule(role)
        problems += axes_have_something_to_split(role)
    first = {problem.key: problem for problem in reversed(problems)}
    return without_followers(reversed(first.values()), roles)


def the_algorithm_file_has_an_effect(c: PPOConfig) -> Problems:
    """The estimator or the loss is one that megarl hasn't."""
    estimator, loss = c.algorithm.adv_estimator, c.actor_rollout_ref.actor.policy_loss
    if c.algorithm.path is not None and estimator in ESTIMATORS and loss in POLICY_LOSSES:
        allowed = f"has no effect: {estimator} and {loss} are megarl's own"
        fix = "algorithm.path=null, or name what the file registers as algorithm.adv_estimator or actor.policy_loss"
        yield Problem("algorithm.path", c.algorithm.path, allowed, fix)


def estimator_settings_have_an_effect(c: PPOConfig) -> Problems:
    """gamma, lam and the like are set only where the estimator reads them."""
    for name in KEYS_OF_ESTIMATORS:
        value, neutral = getattr(c.algorithm, name), default_of(f"algorithm.{name}")
        value = list(value) if isinstance(value, tuple) else value
        if value != neutral and name not in estimator_needs(c).uses:
            readers = ", ".join(e for e, needs in ESTIMATORS.items() if name in needs.uses)
            allowed = f"has no effect on {c.algorithm.adv_estimator}; read by {readers}"
            yield Problem(f"algorithm.{name}", value, allowed, "leave it out")


def an_adaptive_kl_steers_something(c: PPOConfig) -> Problems:
    """An adaptive coefficient is that of the KL in the reward."""
    if c.algorithm.kl_ctrl.type != "fixed" and not c.algorithm.use_kl_in_reward:
        allowed = "has no effect: it steers the KL in the reward, which is off"
        yield Problem("algorithm.kl_ctrl.type", c.algorithm.kl_ctrl.type, allowed, "algorithm.use_kl_in_reward=true")


def a_critic_is_asked_for_where_it_is_read(c: PPOConfig) -> Problems:
    """critic.enable agrees with the estimator."""
    if c.critic.enable and not needs_critic(c):
        allowed = f"has no effect: {c.algorithm.adv_estimator} reads no values, and no critic is built"
        yield Problem("critic.enable", True, allowed, "critic.enable=null, or algorithm.adv_estimator=gae")


def sections_are_those_of_roles_that_there_are(c: PPOConfig) -> Problems:
    """Nothing is set for a critic, reference or reward model that the run doesn't have."""
    roles = (
        (needs_critic(c), CRITIC, f"{c.algorithm.adv_estimator} reads no values, and no critic is built"),
        (needs_reference(c), REF, "no KL term is on, and no reference is built"),
        (needs_reward_model(c), REWARD_MODEL, "reward.model.path names no model"),
    )
    absent = {section: why for is_there, section, why in roles if not is_there}
    main = PPO.config_name if c.actor_rollout_ref.actor.megatron is None else MEGATRON
    defaults = defaults_in(asdict(c), tuple(absent), main)
    for section, why in absent.items():
        for key in _changed_keys(c, section, defaults[section]):
            if key != f"{CRITIC}.enable":
                yield Problem(key, value_of(c, key), f"has no effect: {why}", "leave it out")


def _changed_keys(c: PPOConfig, section: str, defaults: Mapping[str, Any]) -> Iterator[str]:
    """Yield the keys of a section whose values aren't their defaults."""
    for name, default in defaults.items():
        key = f"{section}.{name}"
        value = value_of(c, key)
        if is_dataclass(value):
            yield from _changed_keys(c, key, default)
        elif value != (tuple(default) if isinstance(default, list) else default):
            yield key


def the_last_learning_rate_is_that_of_a_schedule(role: Role) -> Problems:
    """The last learning rate is set only where the schedule ends there."""
    training, shape = role.training, role.at("lr_scheduler.type")
    if training and training.schedule == "constant" and training.min_lr > 0:
        allowed = f"has no effect where {shape} is constant"
        yield Problem(role.at("optim.min_lr"), training.min_lr, allowed, f"{shape}=cosine")


def an_engine_has_experts_to_spread(c: PPOConfig, actor: Role) -> Problems:
    """An engine's ranks have whole experts of a model that has experts."""
    size, shape = c.actor_rollout_ref.rollout.expert_parallel_size, actor.model.known_shape
    if size > 1 and shape is not None and shape.is_mapped and not shape.num_experts:
        key = "actor_rollout_ref.rollout.expert_parallel_size"
        yield Problem(key, size, "has no effect: the model has no experts", f"{key}=1")


def axes_have_something_to_split(role: Role) -> Problems:
    """Axes, recomputation and fields of the backend's act on the role's model."""
    key, backend = role.backend_key, role.backend
    if isinstance(backend, MegatronConfig):
        yield from chunks_take_turns_on_a_pipeline(key, backend)
        yield from router_losses_are_added(f"{key}.override_transformer_config", backend.override_transformer_config)
        if role.model.known_shape is not None:
            yield from what_is_said_of_experts_has_some(key, role.shape, backend)
    if isinstance(backend, FsdpConfig):
        yield from parameters_are_gathered(key, backend)
    if isinstance(backend, TrainedMegatronConfig):
        yield from recomputation_has_layers_to_pick(key, backend.recompute)
        yield from moments_of_16_bits_are_those_of_an_optimizer_that_has_them(key, backend)
        yield from buckets_are_reduced_early(key, backend)


_PPO_RULES: tuple[Callable[[PPOConfig], Problems], ...] = (
    settings_have_an_effect,
    the_algorithm_file_has_an_effect,
    estimator_settings_have_an_effect,
    an_adaptive_kl_steers_something,
    a_critic_is_asked_for_where_it_is_read,
    sections_are_those_of_roles_that_there_are,
)
