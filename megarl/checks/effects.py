"""Settings that mean something only in some modes: changed from their default in another mode, they are an error.

The critic's section is left out on purpose: users switch estimators with one override and keep their file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megarl.algorithm.needs import needs_reward_function, needs_reward_model
from megarl.config.schema import POLICY_LOSSES, PPOConfig
from megarl.errors import Problem
from megarl.roles import REWARD_MODEL, pass_keys

ACTOR, ROLLOUT, REF = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.ref"


@dataclass(frozen=True)
class Effect:
    """``key``, whose default is ``default``, acts only ``where``; words say so and ``fix`` turns that on."""

    key: str
    default: object
    where: Callable[[PPOConfig], bool]
    words: str
    fix: str


def _loss_is(*names: str) -> Callable[[PPOConfig], bool]:
    # A loss of the user's own may read any setting.
    return lambda c: (loss := c.actor_rollout_ref.actor.policy_loss) in names or loss not in POLICY_LOSSES


def _of_loss(setting: str, default: float | None, *names: str) -> Effect:
    key, words = f"{ACTOR}.{setting}", f"{ACTOR}.policy_loss is {' or '.join(names)}"
    return Effect(key, default, _loss_is(*names), words, f"{ACTOR}.policy_loss={names[0]}")


def _of_passes(key: str, default: int | None, by: str, dynamic: bool) -> Effect:
    """``key`` is the size of some pass, by tokens where ``dynamic``. by: what says whether tokens are counted."""

    def decides(c: PPOConfig) -> bool:
        return key in pass_keys(c)

    wanted, null = str(dynamic).lower(), "null" if default is None else default
    return Effect(key, default, decides, f"{by} is {wanted}", f"{key}={null}, or {by}={wanted}")


def _one_side_is_clipped_by_it(c: PPOConfig) -> bool:
    actor = c.actor_rollout_ref.actor
    return actor.clip_ratio_low is None or actor.clip_ratio_high is None


_KL_LOSS = (lambda c: c.actor_rollout_ref.actor.use_kl_loss, f"{ACTOR}.use_kl_loss is on", f"{ACTOR}.use_kl_loss=true")
_KL_REWARD = (
    lambda c: c.algorithm.use_kl_in_reward,
    "algorithm.use_kl_in_reward is on",
    "algorithm.use_kl_in_reward=true",
)
_ADAPTIVE = (
    lambda c: c.algorithm.kl_ctrl.type == "adaptive",
    "algorithm.kl_ctrl.type is adaptive",
    "algorithm.kl_ctrl.type=adaptive",
)
_OVERLONG = (
    lambda c: c.reward.overlong_buffer.enable,
    "reward.overlong_buffer.enable is true",
    "reward.overlong_buffer.enable=true",
)
_FUNCTION = (
    needs_reward_function,
    "a function scores: reward.name or reward.path is set, or reward.model.path isn't",
    "reward.name=NAME or reward.path=FILE.py",
)
_SAMPLES = (
    lambda c: c.actor_rollout_ref.rollout.val_kwargs.temperature > 0,
    f"{ROLLOUT}.val_kwargs.temperature is above 0",
    f"{ROLLOUT}.val_kwargs.temperature=1",
)

_CLIPPED = ("ppo_clip", "gspo", "geo_mean", "cispo", "clip_cov")

EFFECTS: tuple[Effect, ...] = (
    _of_passes(f"{ACTOR}.ppo_micro_batch_size_per_gpu", 16, f"{ACTOR}.use_dynamic_bsz", False),
    _of_passes(f"{ACTOR}.log_prob_micro_batch_size_per_gpu", None, f"{ACTOR}.log_prob_use_dynamic_bsz", False),
    _of_passes(f"{REF}.log_prob_micro_batch_size_per_gpu", None, f"{REF}.log_prob_use_dynamic_bsz", False),
    _of_passes(f"{ACTOR}.ppo_max_token_len_per_gpu", 16384, f"{ACTOR}.use_dynamic_bsz", True),
    _of_passes(f"{ACTOR}.log_prob_max_token_len_per_gpu", None, f"{ACTOR}.log_prob_use_dynamic_bsz", True),
    _of_passes(f"{REF}.log_prob_max_token_len_per_gpu", None, f"{REF}.log_prob_use_dynamic_bsz", True),
    _of_passes(f"{REWARD_MODEL}.micro_batch_size_per_gpu", None, f"{REWARD_MODEL}.use_dynamic_bsz", False),
    _of_passes(f"{REWARD_MODEL}.forward_max_token_len_per_gpu", None, f"{REWARD_MODEL}.use_dynamic_bsz", True),
    Effect(
        f"{ACTOR}.clip_ratio",
        0.2,
        _one_side_is_clipped_by_it,
        "clip_ratio_low or clip_ratio_high is null: they stand for the two sides of it",
        f"leave {ACTOR}.clip_ratio out, or one of the two",
    ),
    _of_loss("clip_ratio", 0.2, *_CLIPPED),
    _of_loss("clip_ratio_low", None, *_CLIPPED),
    _of_loss("clip_ratio_high", None, *_CLIPPED),
    _of_loss("clip_ratio_c", 3.0, "ppo_clip"),
    Effect(f"{ACTOR}.kl_loss_coef", 0.001, *_KL_LOSS),
    Effect(f"{ACTOR}.kl_loss_type", "kl", *_KL_LOSS),
    Effect("algorithm.kl_penalty", "kl", *_KL_REWARD),
    Effect("algorithm.kl_ctrl.kl_coef", 0.001, *_KL_REWARD),
    Effect("algorithm.kl_ctrl.target_kl", 0.1, *_ADAPTIVE),
    Effect("algorithm.kl_ctrl.horizon", 10000, *_ADAPTIVE),
    Effect(
        "algorithm.filter_groups.max_num_gen_batches",
        10,
        lambda c: c.algorithm.filter_groups.enable,
        "algorithm.filter_groups.enable is true",
        "algorithm.filter_groups.enable=true",
    ),
    Effect("reward.overlong_buffer.len", 128, *_OVERLONG),
    Effect("reward.overlong_buffer.penalty_factor", 1.0, *_OVERLONG),
    Effect(
        "reward.function",
        "compute_score",
        lambda c: c.reward.path is not None,
        "reward.path names a file",
        "reward.path=FILE.py",
    ),
    Effect("reward.num_workers", 1, *_FUNCTION),
    Effect("reward.timeout_s", 10.0, *_FUNCTION),
    Effect("reward.score_on_failure", 0.0, *_FUNCTION),
    Effect("reward.model.coef", 1.0, needs_reward_model, "reward.model.path names a model", "reward.model.path=FOLDER"),
    Effect(f"{ROLLOUT}.val_kwargs.top_p", 1.0, *_SAMPLES),
    Effect(f"{ROLLOUT}.val_kwargs.top_k", None, *_SAMPLES),
    Effect(f"{ROLLOUT}.val_kwargs.n", 1, *_SAMPLES),
    _of_loss("policy_loss_settings.tau_positive", 1.0, "sapo"),
    _of_loss("policy_loss_settings.tau_negative", 1.05, "sapo"),
    _of_loss("policy_loss_settings.cov_share", 2e-4, "clip_cov", "kl_cov"),
    _of_loss("policy_loss_settings.cov_low", 1.0, "clip_cov"),
    _of_loss("policy_loss_settings.cov_high", 5.0, "clip_cov"),
    _of_loss("policy_loss_settings.cov_kl_coef", 1.0, "kl_cov"),
)


def settings_have_an_effect(c: PPOConfig) -> Iterator[Problem]:
    """What is changed from its default acts in the chosen mode."""
    for effect in EFFECTS:
        value: Any = c
        for name in effect.key.split("."):
            value = getattr(value, name)
        if value != effect.default and not effect.where(c):
            yield Problem(effect.key, value, f"has an effect only where {effect.words}", effect.fix)
