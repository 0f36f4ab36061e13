"""The actor: the policy that is trained, by PPO-style losses on rollouts or by SFT on demonstrations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megarl.algorithm.aggregate import token_weights_B
from megarl.algorithm.kl import kl_estimators
from megarl.algorithm.policy_loss import PolicyLossInputs, PolicyLossSettings, policy_losses
from megarl.data.batch import MicroBatch
from megarl.model.weights import TensorSource
from megarl.train.model import Loss, ModelSpec
from megarl.train.optimizer import Optimizer, OptimizerSpec, detached, summed
from megarl.train.policy import Policy
from megarl.train.work import Metrics, OptimizerStep, PolicyLossSpec
from megarl.types import Batch


class Actor(Policy):
    """A trainable policy."""

    def __init__(self, spec: ModelSpec, source: TensorSource, optimizer: OptimizerSpec) -> None:
        super().__init__(spec, source)
        self.optimizer = Optimizer(self, optimizer)

    def update(self, batch: Batch, steps: Sequence[OptimizerStep], loss: PolicyLossSpec) -> list[Metrics]:
        """Take optimizer steps on rollouts; return the metrics of each, this data-parallel rank's share of each sum.

        ``batch`` needs old_logprobs_BS and advantages_BS, and ref_logprobs_BS where ``loss.kl_coef`` isn't None.
        Metrics but grad_norm and lr are sums normalised by the whole mini-batch: over data-parallel ranks they add up.
        """
        return [self.optimizer.train(batch, step, self._policy_loss(batch, step, loss)) for step in steps]

    def update_sft(self, batch: Batch, steps: Sequence[OptimizerStep]) -> list[Metrics]:
        """Take optimizer steps on demonstrations: minus the mean log-prob of the masked tokens."""
        return [self.optimizer.train(batch, step, self._sft_loss(step)) for step in steps]

    def evaluate_sft(self, batch: Batch, step: OptimizerStep) -> Metrics:
        """Return the SFT loss without training."""
        self.module.eval()
        with torch.no_grad():
            return summed(self.run(batch, step.micro_batches, self._sft_loss(step), forward_only=True))

    def _policy_loss(self, batch: Batch, step: OptimizerStep, spec: PolicyLossSpec) -> Loss[dict[str, Tensor]]:
        """Return the loss of a micro-batch: sum over tokens of weight * (policy loss + kl_coef * KL)."""
        assert batch.old_logprobs_BS is not None and batch.advantages_BS is not None
        old_BS, advantages_BS, ref_BS = batch.old_logprobs_BS, batch.advantages_BS, batch.ref_logprobs_BS
        weights_B = token_weights_B(spec.loss_agg_mode, batch.mask_BS.sum(-1), step.total_tokens, step.total_rollouts)
        per_token = policy_losses.get("ppo_clip")
        settings = PolicyLossSettings(clip_low=spec.clip_low, clip_high=spec.clip_high)

        def loss(micro: MicroBatch, logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            scores = self.score(micro, logits, spec.temperature)
            logprobs_N, device = scores.logprobs_N, logits.device
            weights_N, old_N = weights_B[micro.row_N].to(device), micro.column(old_BS).to(device)
            advantages_N = micro.column(advantages_BS).to(device)
            sequence_N = micro.row_N.to(device)
            inputs = PolicyLossInputs(logprobs_N, old_N, advantages_N, sequence_N, num_sequences=len(batch))
            policy = per_token(inputs, settings)
            total = policy_loss = (weights_N * policy.loss_N).sum()
            metrics = {
                "policy_loss": policy_loss,
                "entropy": (weights_N * scores.entropy_N).sum(),
                "clip_fraction": (weights_N * policy.clipped_N).sum(),
                "old_kl": (weights_N * (old_N - logprobs_N)).sum(),
            }
            if spec.kl_coef is not None:
                assert ref_BS is not None
                kl = (weights_N * kl_estimators.get(spec.kl_type)(logprobs_N, micro.column(ref_BS).to(device))).sum()
                total = total + spec.kl_coef * kl
                metrics["kl"] = kl
            return total, detached({"loss": total, **metrics})

        return loss

    def _sft_loss(self, step: OptimizerStep) -> Loss[dict[str, Tensor]]:
        """Return the loss of a micro-batch: minus the log-probs of its masked tokens over those of the mini-batch."""

        def loss(micro: MicroBatch, logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            scores = self.score(micro, logits, temperature=1.0)
            total = -scores.logprobs_N.sum() / step.total_tokens
            return total, detached({"loss": total, "entropy": scores.entropy_N.sum() / step.total_tokens})

        return loss
