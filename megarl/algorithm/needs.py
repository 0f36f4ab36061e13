"""What a run needs because of its algorithm: a critic, a reference, a reward model. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass

from megarl.config.schema import PPOConfig


@dataclass(frozen=True)
class EstimatorNeeds:
    """What an estimator needs. uses: keys of ``algorithm`` that it reads, among those that not all do."""

    values: bool = False
    greedy_baseline: bool = False
    min_group_size: int = 1
    uses: tuple[str, ...] = ()


# The estimators of megarl.algorithm.advantage, which can't be asked here: it imports torch. A test compares the two.
ESTIMATORS = {
    "gae": EstimatorNeeds(values=True, uses=("gamma", "lam")),
    "grpo": EstimatorNeeds(min_group_size=2, uses=("norm_adv_by_std_in_grpo",)),
    "grpo_passk": EstimatorNeeds(min_group_size=2, uses=("norm_adv_by_std_in_grpo",)),
    "rloo": EstimatorNeeds(min_group_size=2),
    "remax": EstimatorNeeds(greedy_baseline=True),
    "reinforce_plus_plus": EstimatorNeeds(uses=("gamma",)),
    "reinforce_plus_plus_baseline": EstimatorNeeds(min_group_size=2),
    "opo": EstimatorNeeds(min_group_size=2),
    "gpg": EstimatorNeeds(min_group_size=2),
}
NEUTRAL = {"gamma": 1.0, "lam": 1.0, "norm_adv_by_std_in_grpo": True}


def needs_reference(c: PPOConfig) -> bool:
    """Whether any KL term compares with the reference."""
    return c.actor_rollout_ref.actor.use_kl_loss or c.algorithm.use_kl_in_reward


def needs_reward_model(c: PPOConfig) -> bool:
    """Whether a model scores rollouts."""
    return c.reward.model.path is not None


def needs_reward_function(c: PPOConfig) -> bool:
    """Whether a function scores rollouts: one that is named, or without a reward model those of the data."""
    return c.reward.name is not None or c.reward.path is not None or not needs_reward_model(c)


def needs_critic(c: PPOConfig) -> bool:
    """Whether the run trains a critic."""
    return estimator_needs(c).values


def estimator_needs(c: PPOConfig) -> EstimatorNeeds:
    """Return the needs of the run's estimator.

    One of the user's own has values where critic.enable asks for them, and may read every key. What else it needs it
    says where it is registered, which is checked once its file is loaded.
    """
    own = EstimatorNeeds(values=bool(c.critic.enable), uses=tuple(NEUTRAL))
    return ESTIMATORS.get(c.algorithm.adv_estimator, own)
