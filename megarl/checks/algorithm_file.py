"""The user's own estimators and losses, before anything starts: the file runs, and has what the config names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megarl.algorithm.advantage import estimators
from megarl.algorithm.policy_loss import policy_losses
from megarl.algorithm.user_file import load_user_file
from megarl.catalog import ESTIMATORS
from megarl.config.schema import PPOConfig
from megarl.errors import ConfigError, Problem, nearest


def load_algorithm_file(config: PPOConfig) -> str | None:
    """Load the file at ``algorithm.path`` and return it as ranks can find it; None without one.

    Raises ConfigError where it fails, doesn't register what the config names, or what it registers needs what the
    config lacks.
    """
    path = config.algorithm.path
    if path is None:
        return None
    load_user_file(path)
    if problems := [*_unknown_names(config, path), *_unmet_needs(config)]:
        raise ConfigError(problems)
    return str(Path(path).expanduser().resolve())


def _unknown_names(config: PPOConfig, path: str) -> Iterator[Problem]:
    wanted = (
        (estimators.key, config.algorithm.adv_estimator, estimators.names()),
        (policy_losses.key, config.actor_rollout_ref.actor.policy_loss, policy_losses.names()),
    )
    for key, name, known in wanted:
        if name not in known:
            allowed = f"{path} doesn't register it; registered are {', '.join(known)}"
            yield Problem(key, name, allowed, nearest(name, known))


def _unmet_needs(config: PPOConfig) -> Iterator[Problem]:
    """Yield what the user's estimator needs and the config doesn't give. Rules see to those of megarl's own."""
    name, critic, n = config.algorithm.adv_estimator, config.critic.enable, config.actor_rollout_ref.rollout.n
    if name in ESTIMATORS or name not in estimators.names():
        return
    needs = estimators.needs(name)
    if needs.values and not critic:
        yield Problem("critic.enable", critic, f"{name} needs a critic's values", "critic.enable=true")
    if critic and not needs.values:
        allowed = f"{name} is registered without Needs(values=True): the critic would be trained for nothing"
        yield Problem("critic.enable", critic, allowed, "critic.enable=null")
    if needs.components and not config.algorithm.gdpo_reward_keys:
        key, allowed = "algorithm.gdpo_reward_keys", f"{name} needs the names of components of the reward"
        yield Problem(key, [], allowed, f"{key}=[correct,format]")
    if n < needs.min_group_size:
        key, allowed = "actor_rollout_ref.rollout.n", f"{name} needs at least {needs.min_group_size} rollouts a prompt"
        yield Problem(key, n, allowed, f"{key}={needs.min_group_size}")
