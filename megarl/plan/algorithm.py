"""The algorithm of a run in a few lines, with the values that null keys stand for."""

from __future__ import annotations

from megarl.algorithm.needs import aggregation, clip_range, loss_needs, uses_kl_loss
from megarl.config.schema import PPOConfig


def algorithm_lines(c: PPOConfig) -> tuple[str, ...]:
    """Return estimator, loss and KL as lines for people."""
    actor, temperature = c.actor_rollout_ref.actor, c.actor_rollout_ref.rollout.temperature
    low, high = clip_range(c)
    clips = f"clip {low:g} below and {high:g} above, " if "clip_ratio" in loss_needs(c).uses else ""
    lines = [
        f"estimator: {c.algorithm.adv_estimator}",
        f"loss: {actor.policy_loss}, {clips}{aggregation(c)}",
        f"KL: {_kl(c)}",
    ]
    if temperature != 1:
        lines.append(
            f"temperature {temperature:g}: old log-probs, ratios and KL are of softmax(logits / {temperature:g}), the "
            "distribution that is sampled from, not of the model's own"
        )
    return tuple(lines)


def _kl(c: PPOConfig) -> str:
    actor, algorithm = c.actor_rollout_ref.actor, c.algorithm
    terms = []
    if uses_kl_loss(c):
        terms.append(f"{actor.kl_loss_coef:g} x {actor.kl_loss_type} in the loss")
    if algorithm.use_kl_in_reward:
        terms.append(f"{algorithm.kl_ctrl.kl_coef:g} x {algorithm.kl_penalty} in the reward, {algorithm.kl_ctrl.type}")
    return " and ".join(terms) or "none"
