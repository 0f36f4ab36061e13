"""The needs of a run's algorithm: a critic, a reference, a reward model. Loads no torch."""

from __future__ import annotations

from megarl.catalog import ESTIMATORS, POLICY_LOSSES, LossNeeds, Needs
from megarl.config.schema import PPOConfig

# Keys of ``algorithm`` that some estimators read and others don't.
KEYS_OF_ESTIMATORS = tuple(dict.fromkeys(name for needs in ESTIMATORS.values() for name in needs.uses))


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


def needs_old_logprobs(c: PPOConfig) -> bool:
    """Whether anything but the first update of a step reads log-probs by the actor before it.

    Weights and rejections of rollout correction do, KL in the reward, losses that choose tokens, and further epochs.
    """
    actor, correction = c.actor_rollout_ref.actor, c.algorithm.rollout_correction
    loss = POLICY_LOSSES.get(actor.policy_loss, LossNeeds())
    corrects = correction.preset not in (None, "metrics_only") or correction.level or correction.rejections
    return bool(corrects or c.algorithm.use_kl_in_reward or loss.chosen_tokens or actor.ppo_epochs > 1)


def reuses_update(c: PPOConfig) -> bool:
    """Whether the old log-probs of a step's first mini-batch are those of its own update, detached."""
    is_bypassed = c.algorithm.rollout_correction.bypass
    return not (needs_old_logprobs(c) or is_bypassed or c.actor_rollout_ref.actor.separate_old_log_probs)


def estimator_needs(c: PPOConfig) -> Needs:
    """Return the Needs of the run's estimator.

    An estimator of the user's own has values where critic.enable asks for them, and may read every key. Its other
    needs are said where it is registered, and checked once its file is loaded.
    """
    own = Needs(values=bool(c.critic.enable), uses=KEYS_OF_ESTIMATORS)
    return ESTIMATORS.get(c.algorithm.adv_estimator, own)
