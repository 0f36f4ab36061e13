"""The algorithm of a run in a few lines, with the values that null keys stand for."""

from __future__ import annotations

from megarl.algorithm.needs import aggregation, clip_range, loss_needs, reward_components, uses_kl_loss, weight_level
from megarl.config.schema import PPOConfig


def algorithm_lines(c: PPOConfig) -> tuple[str, ...]:
    """Return estimator, loss and KL as lines for people."""
    actor, temperature = c.actor_rollout_ref.actor, c.actor_rollout_ref.rollout.temperature
    low, high = clip_range(c)
    clips = f"clip {low:g} below and {high:g} above, " if "clip_ratio" in loss_needs(c).uses else ""
    lines = [
        f"estimator: {c.algorithm.adv_estimator}{_components(c)}",
        f"loss: {actor.policy_loss}, {clips}{aggregation(c)}",
        f"KL: {_kl(c)}",
    ]
    if c.algorithm.overlong_filtering:
        lines.append("responses cut at the limit: in no loss; their rewards count in the baselines of their groups")
    if corrected := _correction(c):
        lines.append(f"engine against trainer: {corrected}")
    if temperature != 1:
        lines.append(
            f"temperature {temperature:g}: old log-probs, ratios and KL are of softmax(logits / {temperature:g}), the "
            "distribution that is sampled from, not of the model's own"
        )
    return tuple(lines)


def _components(c: PPOConfig) -> str:
    names = reward_components(c)
    weights = c.algorithm.gdpo_reward_weights or (1,) * len(names)
    terms = " + ".join(f"{weight:g} x {name}" for weight, name in zip(weights, names, strict=True))
    return f" of {terms}, each normalised by its group" if names else ""


def _correction(c: PPOConfig) -> str:
    """Return the words on what is done about the engine's log-probs, empty where nothing is."""
    correction = c.algorithm.rollout_correction
    level, delta, parts = weight_level(c), correction.off_policy_mask_delta, []
    if correction.preset:
        parts.append(correction.preset)
    elif level:
        parts.append(f"weights of each {level}")
    parts += [f"rejection by {rejection.criterion}" for rejection in correction.rejections]
    if correction.bypass:
        parts = [f"{part} in every optimizer step" for part in parts]
        parts.insert(0, "its log-probs are the old ones (bypass)")
    if delta is not None:
        parts.append(f"no loss where the advantage is negative and log(engine / policy) above {delta:g} a token")
    return ", ".join(parts)


def _kl(c: PPOConfig) -> str:
    actor, algorithm = c.actor_rollout_ref.actor, c.algorithm
    terms = []
    if uses_kl_loss(c):
        terms.append(f"{actor.kl_loss_coef:g} x {actor.kl_loss_type} in the loss")
    if algorithm.use_kl_in_reward:
        terms.append(f"{algorithm.kl_ctrl.kl_coef:g} x {algorithm.kl_penalty} in the reward, {algorithm.kl_ctrl.type}")
    return " and ".join(terms) or "none"
