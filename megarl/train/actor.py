"""The actor: the policy that is trained, by PPO-style losses on rollouts or by SFT on demonstrations."""

from __future__ import annotations

import torch
from torch import Tensor

from megarl.algorithm.aggregate import token_weights_B
from megarl.algorithm.kl import kl_estimators
from megarl.algorithm.loss_specs import PolicyLossSpec
from megarl.algorithm.policy_loss import PolicyLossInputs, token_loss
from megarl.algorithm.rollout_correction import CorrectionSettings, update_factors
from megarl.batching.pack import MicroBatch
from megarl.train.backend import Backend, Loss, Output
from megarl.train.scoring import on_tokens, token_logprobs
from megarl.train.updating import detached, take_steps
from megarl.train.work import OptimizerStep, ScoreWork, Updated, UpdateWork
from megarl.types import PolicyBatch

Seen = list[tuple[MicroBatch, Tensor]]


class Actor:
    """A trainable policy on a backend."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def score(self, work: ScoreWork) -> Tensor | None:
        """Return log-probs [B, S] of the masked tokens on the ranks that report results, else None."""
        return token_logprobs(self.backend, work)

    def update(self, work: UpdateWork) -> Updated:
        """Take optimizer steps on rollouts or demonstrations.

        Metrics that aren't whole are sums normalised by the whole mini-batch: over data-parallel ranks they add up.
        """
        if not isinstance(work.loss, PolicyLossSpec):
            return Updated(take_steps(self.backend, work, _demonstration_loss))
        assert isinstance(work.batch, PolicyBatch)
        spec, batch, seen = work.loss, work.batch, Seen()
        metrics = take_steps(self.backend, work, lambda step: _policy_loss(spec, batch, step, seen))
        is_wanted = self.backend.place.reports and any(step.is_on_policy for step in work.steps)
        return Updated(metrics, on_tokens(batch, seen) if is_wanted else None)


def _policy_loss(spec: PolicyLossSpec, batch: PolicyBatch, step: OptimizerStep, seen: Seen) -> Loss:
    """Return the loss of a micro-batch: sum of weight * (policy loss - entropy_coef * H + kl_coef * KL).

    seen: receives the log-probs of steps on policy.
    """
    weights_B = token_weights_B(
        spec.loss_agg_mode, batch.mask_BS.sum(-1), step.total_tokens, step.total_rollouts, max_tokens=spec.max_tokens
    )

    def loss(micro: MicroBatch, output: Output) -> tuple[Tensor, dict[str, Tensor]]:
        scores, device = output.logprobs(spec.temperature), output.device
        old_N = None if step.is_on_policy else _column(micro, batch.old_logprobs_BS, device)
        if old_N is None:
            old_N = scores.logprobs_N.detach()
            seen.append((micro, old_N))
        weights_N = weights_B[micro.row_N].to(device)
        inputs = PolicyLossInputs(
            scores.logprobs_N,
            old_N,
            micro.column(batch.advantages_BS).to(device),
            sequence_N=micro.row_N.to(device),
            num_sequences=len(batch),
            rollout_weights_N=_column(micro, batch.policy_weights_BS, device),
            selected_N=_column(micro, batch.selected_BS, device),
        )
        policy = token_loss(spec.name, inputs, spec.settings)
        loss_N = policy.loss_N
        corrected: dict[str, Tensor] = {}
        if spec.correction is not None:
            engine_N = _column(micro, batch.rollout_logprobs_BS, device)
            assert engine_N is not None
            factors_N, corrected = _factors(inputs, engine_N, weights_N, spec.correction)
            loss_N = loss_N * factors_N
        total = policy_loss = (weights_N * loss_N).sum()
        entropy = (weights_N * scores.entropy_N).sum()
        metrics = {
            "policy_loss": policy_loss,
            "entropy": entropy,
            "clip_fraction": (weights_N * policy.clipped_N).sum(),
            "old_kl": (weights_N * (old_N - scores.logprobs_N)).sum(),
            **corrected,
        }
        if spec.entropy_coef:
            total = total - spec.entropy_coef * entropy
        if spec.kl_coef is not None:
            ref_N = _column(micro, batch.ref_logprobs_BS, device)
            assert ref_N is not None
            kl = (weights_N * kl_estimators.get(spec.kl_type)(scores.logprobs_N, ref_N)).sum()
            kl = kl + 0.0 * ref_N.sum()  # NaN where one is infinite, which some estimators would clamp unseen
            total = total + spec.kl_coef * kl
            metrics["kl"] = kl
        return total, detached({"loss": total, **metrics})

    return loss


def _factors(
    inputs: PolicyLossInputs, engine_N: Tensor, weights_N: Tensor, settings: CorrectionSettings
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the factors of the policy loss by how far the policy is from the engine, and metrics of both."""
    log_ratio_N = inputs.logprobs_N.detach() - engine_N
    factors_N = update_factors(log_ratio_N, inputs.advantages_N, inputs.sequence_N, settings)
    return factors_N, {
        "engine_kl": -(weights_N * log_ratio_N).sum(),
        "masked_fraction": (weights_N * (factors_N == 0)).sum(),
        "engine_weight": (weights_N * factors_N).sum(),
    }


def _demonstration_loss(step: OptimizerStep) -> Loss:
    """Return the loss of a micro-batch: minus the log-probs of its masked tokens over those of the mini-batch."""

    def loss(micro: MicroBatch, output: Output) -> tuple[Tensor, dict[str, Tensor]]:
        scores = output.logprobs(temperature=1.0)
        total = -scores.logprobs_N.sum() / step.total_tokens
        return total, detached({"loss": total, "entropy": scores.entropy_N.sum() / step.total_tokens})

    return loss


def _column(micro: MicroBatch, values_BS: Tensor | None, device: torch.device) -> Tensor | None:
    """Return a column of the batch at the micro-batch's tokens, None where the batch lacks it."""
    return None if values_BS is None else micro.column(values_BS).to(device)
