"""The needs of a run's algorithm: a critic, a reference, a reward model. Loads no torch."""

from __future__ import annotations

from megarl.catalog import CORRECTION_PRESETS, ESTIMATORS, POLICY_LOSSES, LossNeeds, Needs
from megarl.config.schema import PPOConfig

# Keys of ``algorithm`` that some estimators read and others don't.
KEYS_OF_ESTIMATORS = tuple(dict.fromkeys(name for needs in ESTIMATORS.values() for name in needs.uses))


def uses_kl_loss(c: PPOConfig) -> bool:
    """Whether the loss has a KL term: where null leaves it open, grpo without another has one unless it is kl_free."""
    asked, algorithm = c.actor_rollout_ref.actor.use_kl_loss, c.algorithm
    is_open = algorithm.adv_estimator == "grpo" and not algorithm.use_kl_in_reward and not algorithm.kl_free
    return is_open if asked is None else asked


def needs_reference(c: PPOConfig) -> bool:
    """Whether any KL term compares with the reference."""
    return uses_kl_loss(c) or c.algorithm.use_kl_in_reward


def reward_components(c: PPOConfig) -> tuple[str, ...]:
    """Return the names of the parts of a reward that the estimator reads; one of the user's own may read any."""
    algorithm = c.algorithm
    reads = algorithm.adv_estimator not in ESTIMATORS or estimator_needs(c).components
    return algorithm.gdpo_reward_keys if reads else ()


def loss_needs(c: PPOConfig) -> LossNeeds:
    """Return the LossNeeds of the run's policy loss; one of the user's own has those of any."""
    return POLICY_LOSSES.get(c.actor_rollout_ref.actor.policy_loss, LossNeeds())


def aggregation(c: PPOConfig) -> str:
    """Return the aggregation of the policy loss: the paper's own where the config has null."""
    return c.actor_rollout_ref.actor.loss_agg_mode or loss_needs(c).aggregations[0]


def clip_range(c: PPOConfig) -> tuple[float, float]:
    """Return the lower and upper clip range of the policy loss: the paper's own where the config has null."""
    actor, needs = c.actor_rollout_ref.actor, loss_needs(c)
    both = (actor.clip_ratio, actor.clip_ratio) if actor.clip_ratio is not None else (needs.clip_low, needs.clip_high)
    low = both[0] if actor.clip_ratio_low is None else actor.clip_ratio_low
    return low, both[1] if actor.clip_ratio_high is None else actor.clip_ratio_high


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
    epochs, has_chosen = c.actor_rollout_ref.actor.ppo_epochs, loss_needs(c).chosen_tokens
    return weighs_or_rejects(c) or c.algorithm.use_kl_in_reward or has_chosen or epochs > 1


def weighs_or_rejects(c: PPOConfig) -> bool:
    """Whether rollout correction has weights or rejections."""
    correction = c.algorithm.rollout_correction
    return bool(correction.preset not in (None, "metrics_only") or correction.level or correction.rejections)


def weight_level(c: PPOConfig) -> str | None:
    """Return the level of the importance weights of rollout correction, None where there are none."""
    correction = c.algorithm.rollout_correction
    return CORRECTION_PRESETS.get(correction.preset) if correction.preset else correction.level


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
