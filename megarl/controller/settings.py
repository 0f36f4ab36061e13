"""From sections of the config to the settings that algorithms, roles and the engine take."""

from __future__ import annotations

import math
from collections.abc import Callable

from megarl.algorithm.advantage import (
    AdvantageInputs,
    Advantages,
    AdvantageSettings,
    estimate_advantages,
    estimators,
)
from megarl.algorithm.kl_control import KLController, KLControlSettings, kl_controllers
from megarl.algorithm.policy_loss import PolicyLossSettings
from megarl.algorithm.rollout_correction import CorrectionSettings, Rejection, presets
from megarl.algorithm.user_file import user_errors_named
from megarl.batching.balance import TokenBudget, pass_cost
from megarl.checks.algorithm import needs_critic, needs_reference, needs_reward_model
from megarl.checks.passes import (
    PassSize,
    actor_scoring,
    actor_update,
    critic_scoring,
    critic_update,
    ref_scoring,
    reward_scoring,
)
from megarl.checks.rules import num_ranks
from megarl.config.schema import PPOConfig
from megarl.controller.ranks import RoleLayout
from megarl.parallel.layout import layout_of
from megarl.plan.step_time import active_parameters
from megarl.train.work import PolicyLossSpec, ValueLossSpec
from megarl.types import Sampling
from megarl.weights.model_shape import ModelShape


def advantage_settings(config: PPOConfig) -> AdvantageSettings:
    """Return the settings of the advantage estimator."""
    algorithm = config.algorithm
    return AdvantageSettings(algorithm.norm_adv_by_std_in_grpo, gamma=algorithm.gamma, lam=algorithm.lam)


def estimator(config: PPOConfig) -> Callable[[AdvantageInputs], Advantages]:
    """Return the advantage estimator with its settings. It raises AlgorithmError where a user's own fails."""
    name, settings = config.algorithm.adv_estimator, advantage_settings(config)

    def estimate(inputs: AdvantageInputs) -> Advantages:
        with user_errors_named(estimators.key, name):
            return estimate_advantages(name, inputs, settings)

    return estimate


def policy_loss(config: PPOConfig) -> PolicyLossSpec:
    """Return the actor's loss."""
    models = config.actor_rollout_ref
    actor, extra = models.actor, models.actor.policy_loss_settings
    return PolicyLossSpec(
        settings=PolicyLossSettings(
            clip_low=actor.clip_ratio if actor.clip_ratio_low is None else actor.clip_ratio_low,
            clip_high=actor.clip_ratio if actor.clip_ratio_high is None else actor.clip_ratio_high,
            clip_c=actor.clip_ratio_c,
            tau_positive=extra.tau_positive,
            tau_negative=extra.tau_negative,
            cov_share=extra.cov_share,
            cov_low=extra.cov_low,
            cov_high=extra.cov_high,
            cov_kl_coef=extra.cov_kl_coef,
        ),
        loss_agg_mode=actor.loss_agg_mode,
        kl_coef=actor.kl_loss_coef if actor.use_kl_loss else None,
        kl_type=actor.kl_loss_type,
        temperature=models.rollout.temperature,
        name=actor.policy_loss,
        entropy_coef=actor.entropy_coeff,
        max_tokens=config.data.max_response_length,
    )


def value_loss(config: PPOConfig) -> ValueLossSpec:
    """Return the critic's loss."""
    critic = config.critic
    return ValueLossSpec(critic.cliprange_value, critic.loss_agg_mode, config.data.max_response_length)


def kl_controller(config: PPOConfig) -> KLController:
    """Return the controller of the KL in the reward, as it starts."""
    control = config.algorithm.kl_ctrl
    return kl_controllers.get(control.type)(KLControlSettings(control.kl_coef, control.target_kl, control.horizon))


def correction_settings(config: PPOConfig) -> CorrectionSettings:
    """Return what rollout correction does: a preset, or what the keys say."""
    correction = config.algorithm.rollout_correction
    if correction.preset is not None:
        return presets.get(correction.preset)
    low, high = correction.band or (0.0, math.inf)
    return CorrectionSettings(
        level=correction.level,
        cap=math.inf if correction.cap is None else correction.cap,
        band=(low, high),
        normalize=correction.normalize,
        rejections=tuple(
            Rejection(r.criterion, r.low, math.inf if r.high is None else r.high) for r in correction.rejections
        ),
    )


def train_sampling(config: PPOConfig, stop_token_ids: tuple[int, ...]) -> Sampling:
    """Return how rollouts are sampled for training."""
    rollout = config.actor_rollout_ref.rollout
    return Sampling(
        n=rollout.n,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        max_tokens=config.data.max_response_length,
        stop_token_ids=stop_token_ids,
        ignore_eos=rollout.ignore_eos,
        with_greedy=estimators.needs(config.algorithm.adv_estimator).greedy_baseline,
    )


def val_sampling(config: PPOConfig, stop_token_ids: tuple[int, ...]) -> Sampling:
    """Return how rollouts are sampled for validation."""
    kwargs = config.actor_rollout_ref.rollout.val_kwargs
    return Sampling(
        n=kwargs.n,
        temperature=kwargs.temperature,
        top_p=kwargs.top_p,
        top_k=kwargs.top_k,
        max_tokens=config.data.max_response_length,
        stop_token_ids=stop_token_ids,
    )


def role_layouts(
    config: PPOConfig, actor: ModelShape, critic: ModelShape | None = None, reward_model: ModelShape | None = None
) -> dict[str, RoleLayout]:
    """Return the layout and the micro-batches of every role of the run, by the shapes of the models."""
    roles = {"actor": _role_layout(config, actor, actor_scoring(config), actor_update(config))}
    if needs_reference(config):
        roles["ref"] = _role_layout(config, actor, ref_scoring(config))
    if needs_critic(config):
        assert critic is not None
        roles["critic"] = _role_layout(config, critic.with_value_head(), critic_scoring(config), critic_update(config))
    if needs_reward_model(config):
        assert reward_model is not None
        roles["reward model"] = _role_layout(config, reward_model, reward_scoring(config))
    return roles


def _role_layout(config: PPOConfig, shape: ModelShape, score: PassSize, update: PassSize | None = None) -> RoleLayout:
    layout = layout_of(score.megatron, num_ranks(config))
    cost = pass_cost(active_parameters(shape), shape.num_layers * shape.num_heads * shape.head_dim)
    multiple = layout.pp if layout.vpp > 1 else 1

    def budget(size: PassSize | None) -> TokenBudget | None:
        if size is None or size.max_tokens is None:
            return None
        return TokenBudget(size.max_tokens, cost, multiple, size.sequence_multiple)

    return RoleLayout(layout, score.micro_batch_size, budget(score), budget(update))
