"""The algorithm of a run with all its settings resolved: from rollouts and log-probs to what is trained on.

Shape suffixes: B rollouts, S sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from megarl.algorithm.advantage import (
    AdvantageInputs,
    Advantages,
    AdvantageSettings,
    estimate_advantages,
    estimators,
)
from megarl.algorithm.covariance import select_tokens
from megarl.algorithm.kl import KLEstimator, kl_estimators
from megarl.algorithm.kl_control import KLController, KLControlSettings, kl_controllers
from megarl.algorithm.loss_specs import PolicyLossSpec, ValueLossSpec
from megarl.algorithm.metrics import logprob_difference, masked_mean
from megarl.algorithm.needs import aggregation, clip_range, reuses_update, uses_kl_loss
from megarl.algorithm.policy_loss import PolicyLossSettings
from megarl.algorithm.rollout_correction import CorrectionSettings, Rejection, correct_rollouts, presets
from megarl.algorithm.samples import Samples
from megarl.algorithm.seeds import seed_of
from megarl.algorithm.token_rewards import penalize_rewards
from megarl.algorithm.user_file import user_errors_named
from megarl.algorithm.value_loss import explained_variance
from megarl.catalog import AGGREGATIONS
from megarl.config.schema import PPOConfig, RolloutCorrectionConfig
from megarl.types import Metrics, PolicyBatch, RolloutBatch, Sequences, ValueBatch


class ActorLogprobs(Protocol):
    """The part of the actor on its ranks that the recipe asks."""

    def logprobs(self, sequences: Sequences, rows: Sequence[int] | None = None) -> Tensor:
        """Return log-probs [B, S] of the masked tokens, of the given rows alone where they are given."""
        ...

    def later_rows(self, sequences: Sequences, step: int) -> list[int]:
        """Return the rows of all mini-batches of a step but the first."""
        ...


@dataclass(frozen=True)
class TrainBatch:
    """What a step trains on, and metrics of how it came about. values: None without a critic."""

    policy: Sequences
    values: ValueBatch | None
    metrics: Metrics


@dataclass(frozen=True)
class Update:
    """What an update did.

    metrics: means over its optimizer steps. logprobs_BS: log-probs that steps took as the old ones, zero in other
    rows; None where no step took its own.
    """

    metrics: Metrics
    logprobs_BS: Tensor | None = None


class Recipe:
    """The algorithm of an RL run. The coefficient of the KL in the reward is all that changes from step to step.

    reuses_update: whether the old log-probs of the first mini-batch are those of its own update.
    """

    def __init__(self, config: PPOConfig) -> None:
        algorithm = config.algorithm
        self.seed = config.trainer.seed
        self.estimate = _estimator(config)
        self.policy_loss = _policy_loss(config)
        self.value_loss = ValueLossSpec(
            config.critic.cliprange_value,
            config.critic.loss_agg_mode or AGGREGATIONS[0],
            config.data.max_response_length,
        )
        control = algorithm.kl_ctrl
        self.kl_controller: KLController = kl_controllers.get(control.type)(
            KLControlSettings(control.kl_coef, control.target_kl, control.horizon)
        )
        self.kl_in_reward: KLEstimator | None = None
        if algorithm.use_kl_in_reward:
            self.kl_in_reward = kl_estimators.get(algorithm.kl_penalty, key="algorithm.kl_penalty")
        self.correction, _ = _corrections(algorithm.rollout_correction)
        self.bypasses = algorithm.rollout_correction.bypass
        self.leaves_out_cut = algorithm.overlong_filtering
        self.critic_warmup_steps = config.critic.warmup_steps if estimators.needs(algorithm.adv_estimator).values else 0
        self.reuses_update = reuses_update(config)

    def old_logprobs(self, samples: Samples, actor: ActorLogprobs, step: int) -> Tensor | None:
        """Return log-probs [B, S] by the actor before its update; None where the update's own will do.

        They are the engine's where rollout correction is bypassed. Rows of the first mini-batch are zero where the
        update gives theirs.
        """
        if self.bypasses:
            return samples.batch.rollout_logprobs_BS
        if not self._first_is_on_policy(step):
            return actor.logprobs(samples.batch)
        later = actor.later_rows(samples.batch, step)
        return actor.logprobs(samples.batch, later) if later else None

    def train_batch(
        self, samples: Samples, old_BS: Tensor | None, ref_BS: Tensor | None, values_BS: Tensor | None, step: int
    ) -> TrainBatch:
        """Return the TrainBatch of a step. old_BS, ref_BS, values_BS: [B, S], None where nothing needs them.

        Responses that overlong filtering leaves out are in no loss; rewards and advantages are those of a run with
        them, so that the baseline of a group is the mean of all of its rewards.
        """
        batch, rewards_B = samples.batch, samples.rewards.scores_B
        token_rewards_BS, metrics = self._penalize(batch, rewards_B, old_BS, ref_BS)
        inputs = AdvantageInputs(
            rewards_B,
            batch.group_B,
            batch.mask_BS,
            token_rewards_BS,
            values_BS,
            samples.baseline_B,
            samples.rewards.components_BK,
        )
        advantages = self.estimate(inputs)
        metrics["advantage/mean_abs"] = masked_mean(advantages.advantages_BS.abs(), batch.mask_BS)
        batch = replace(batch, mask_BS=self._mask(samples))
        mask_BS, weights_BS, selected_BS = batch.mask_BS, None, None
        reuses = self._first_is_on_policy(step)
        if not reuses:
            assert old_BS is not None
            corrected = correct_rollouts(old_BS, batch.rollout_logprobs_BS, batch.mask_BS, self.correction)
            mask_BS, weights_BS = corrected.mask_BS, corrected.weights_BS
            metrics |= _of_correction(corrected.metrics) | _differences(batch, old_BS)
            selected_BS = select_tokens(
                self.policy_loss.name,
                old_BS,
                advantages.advantages_BS,
                mask_BS,
                self.policy_loss.settings,
                seed_of(self.seed, "select", step),
            )
        rows = replace(batch.alone(), mask_BS=mask_BS)
        policy = PolicyBatch(
            **vars(rows),
            advantages_BS=advantages.advantages_BS,
            old_logprobs_BS=old_BS,
            ref_logprobs_BS=ref_BS,
            policy_weights_BS=weights_BS,
            selected_BS=selected_BS,
            rollout_logprobs_BS=batch.rollout_logprobs_BS if self.policy_loss.correction else None,
            first_is_on_policy=reuses,
        )
        if values_BS is None:
            return TrainBatch(policy, None, metrics)
        assert advantages.returns_BS is not None
        return TrainBatch(
            policy, ValueBatch(**vars(rows), values_BS=values_BS, returns_BS=advantages.returns_BS), metrics
        )

    def metrics(self, samples: Samples, batch: TrainBatch, update: Update | None) -> Metrics:
        """Return the metrics of a step: rewards, lengths, groups, the engine against the trainer, values.

        update: the actor's, None in a step that trains the critic alone.
        """
        rows, rewards = samples.batch, samples.rewards
        tokens_B = rows.mask_BS.sum(-1)
        found = {
            **rewards.metrics(),
            "response/mean_tokens": float(tokens_B.float().mean()),
            "response/max_tokens": float(tokens_B.max()),
            "response/total_tokens": float(tokens_B.sum()),
            "response/share_cut": float(samples.is_cut_B.float().mean()),
            "group/share_without_spread": float((~rewards.has_spread(rows.group_B)).float().mean()),
            "rollout/policy_version": float(rows.policy_version_B.min()),
            **_staleness(samples),
            **batch.metrics,
        }
        if update and update.logprobs_BS is not None:
            assert isinstance(batch.policy, PolicyBatch)
            later_BS = batch.policy.old_logprobs_BS
            old_BS = update.logprobs_BS if later_BS is None else update.logprobs_BS + later_BS
            rows = replace(rows, mask_BS=batch.policy.mask_BS)
            corrected = correct_rollouts(old_BS, rows.rollout_logprobs_BS, rows.mask_BS, self.correction)
            found |= _of_correction(corrected.metrics) | _differences(rows, old_BS)
        if batch.values is not None:
            found |= _of_values(batch.values)
        return found

    def _mask(self, samples: Samples) -> Tensor:
        """Return the mask [B, S] of the tokens that a step may train on."""
        mask_BS = samples.batch.mask_BS
        return mask_BS & ~samples.is_cut_B[:, None] if self.leaves_out_cut else mask_BS

    def _first_is_on_policy(self, step: int) -> bool:
        return self.reuses_update and step > self.critic_warmup_steps

    def _penalize(
        self, batch: RolloutBatch, rewards_B: Tensor, old_BS: Tensor | None, ref_BS: Tensor | None
    ) -> tuple[Tensor | None, Metrics]:
        """Return rewards [B, S] of tokens with KL to the reference subtracted, and steer its coefficient by that KL.

        None, and no metrics, where the reward has no KL.
        """
        if self.kl_in_reward is None:
            return None, {}
        assert old_BS is not None and ref_BS is not None
        kl_BS, coef = self.kl_in_reward(old_BS, ref_BS), self.kl_controller.coef
        kl = masked_mean(kl_BS, batch.mask_BS)
        self.kl_controller = self.kl_controller.after(kl, len(batch))
        return penalize_rewards(rewards_B, kl_BS, batch.mask_BS, coef), {"reward/kl": kl, "reward/kl_coef": coef}


def _of_correction(metrics: Mapping[str, float]) -> Metrics:
    return {f"rollout_train/{name}": value for name, value in metrics.items()}


def _staleness(samples: Samples) -> Metrics:
    """Return by how many publications rollouts are older than the weights that train on them."""
    if samples.current_version is None:
        return {}
    age_B = samples.current_version - samples.batch.policy_version_B
    rollouts = [rollout for group in samples.groups for rollout in group]
    return {
        "rollout/staleness_mean": float(age_B.float().mean()),
        "rollout/staleness_max": float(age_B.max()),
        "rollout/share_of_several_versions": sum(bool(r.switches) for r in rollouts) / len(rollouts),
    }


def _differences(batch: RolloutBatch, old_BS: Tensor) -> Metrics:
    """Return the differences between the engine's log-probs and the trainer's."""
    difference = logprob_difference(old_BS, batch.rollout_logprobs_BS, batch.mask_BS)
    return {
        "rollout_train/logprob_diff_mean": difference.mean_abs,
        "rollout_train/logprob_diff_max": difference.max_abs,
        "rollout_train/kl": difference.kl,
    }


def _of_values(batch: ValueBatch) -> Metrics:
    return {
        "critic/values_mean": masked_mean(batch.values_BS, batch.mask_BS),
        "critic/returns_mean": masked_mean(batch.returns_BS, batch.mask_BS),
        "critic/explained_variance": explained_variance(batch.values_BS, batch.returns_BS, batch.mask_BS),
    }


def _estimator(config: PPOConfig) -> Callable[[AdvantageInputs], Advantages]:
    """Return the advantage estimator with its settings. It raises AlgorithmError where a user's own fails."""
    algorithm = config.algorithm
    name = algorithm.adv_estimator
    settings = AdvantageSettings(
        algorithm.norm_adv_by_std_in_grpo,
        gamma=algorithm.gamma,
        lam=algorithm.lam,
        component_weights=algorithm.gdpo_reward_weights,
    )

    def estimate(inputs: AdvantageInputs) -> Advantages:
        with user_errors_named(estimators.key, name):
            return estimate_advantages(name, inputs, settings)

    return estimate


def _policy_loss(config: PPOConfig) -> PolicyLossSpec:
    models = config.actor_rollout_ref
    actor, extra = models.actor, models.actor.policy_loss_settings
    clip_low, clip_high = clip_range(config)
    return PolicyLossSpec(
        settings=PolicyLossSettings(
            clip_low=clip_low,
            clip_high=clip_high,
            clip_c=actor.clip_ratio_c,
            tau_positive=extra.tau_positive,
            tau_negative=extra.tau_negative,
            cov_share=extra.cov_share,
            cov_low=extra.cov_low,
            cov_high=extra.cov_high,
            cov_kl_coef=extra.cov_kl_coef,
        ),
        loss_agg_mode=aggregation(config),
        kl_coef=actor.kl_loss_coef if uses_kl_loss(config) else None,
        kl_type=actor.kl_loss_type,
        temperature=models.rollout.temperature,
        name=actor.policy_loss,
        entropy_coef=actor.entropy_coeff,
        correction=_corrections(config.algorithm.rollout_correction)[1],
        max_tokens=config.data.max_response_length,
    )


def _corrections(config: RolloutCorrectionConfig) -> tuple[CorrectionSettings, CorrectionSettings | None]:
    """Return the corrections before the update of a step, and those in every optimizer step; None: none.

    A bypass leaves all of it to the optimizer steps: before the update there are no log-probs by the actor to compare.
    """
    before, delta = _before_update(config), config.off_policy_mask_delta
    if not config.bypass:
        return before, None if delta is None else CorrectionSettings(off_policy_delta=delta)
    during = replace(before, off_policy_delta=delta)
    return CorrectionSettings(), during if during != CorrectionSettings() else None


def _before_update(config: RolloutCorrectionConfig) -> CorrectionSettings:
    """Return the settings of weights and rejections: a preset's, or those of the keys."""
    if config.preset is not None:
        return presets.get(config.preset)
    low, high = config.band or (0.0, math.inf)
    return CorrectionSettings(
        level=config.level,
        cap=math.inf if config.cap is None else config.cap,
        band=(low, high),
        normalize=config.normalize,
        rejections=tuple(
            Rejection(r.criterion, r.low, math.inf if r.high is None else r.high) for r in config.rejections
        ),
    )
