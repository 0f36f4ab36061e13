"""The actor: the policy that is trained, by PPO-style losses on rollouts or by SFT on demonstrations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megarl.algorithm.aggregate import token_weights_B
from megarl.algorithm.kl import kl_estimators
from megarl.algorithm.policy_loss import PolicyLossInputs, token_loss
from megarl.batching.pack import MicroBatch
from megarl.train.megatron.model import Loss, ModelSpec
from megarl.train.megatron.optimizer import Optimizer, OptimizerSpec, detached, summed
from megarl.train.policy import Policy
from megarl.train.work import Metrics, OptimizerStep, PolicyLossSpec
from megarl.types import Batch
from megarl.weights.sources import TensorSource


class Actor(Policy):
    """A trainable policy."""

    def __init__(self, spec: ModelSpec, source: TensorSource, optimizer: OptimizerSpec) -> None:
        super().__init__(spec, source)
        self.optimizer = Optimizer(self, optimizer)

    def update(self, batch: Batch, steps: Sequence[OptimizerStep], loss: PolicyLossSpec) -> list[Metrics]:
        """Take optimizer steps on rollouts; return the metrics of each, this data-parallel rank's share of each sum.

        ``batch`` needs old_logprobs_BS and advantages_BS, and ref_logprobs_BS where ``loss.kl_coef`` isn't None.
        Those that aren't whole are sums normalised by the whole mini-batch: over data-parallel ranks they add up.
        """
        with self.optimizer.resident():
            return [self.optimizer.train(batch, step, self._policy_loss(batch, step, loss)) for step in steps]

    def update_sft(self, batch: Batch, steps: Sequence[OptimizerStep]) -> list[Metrics]:
        """Take optimizer steps on demonstrations: minus the mean log-prob of the masked tokens."""
        with self.optimizer.resident():
            return [self.optimizer.train(batch, step, self._sft_loss(step)) for step in steps]

    def evaluate_sft(self, batch: Batch, step: OptimizerStep) -> Metrics:
        """Return the SFT loss without training."""
        self.set_training(False)
        with torch.no_grad():
            return summed(self.run(batch, step.micro_batches, self._sft_loss(step), forward_only=True))

    def _policy_loss(self, batch: Batch, step: OptimizerStep, spec: PolicyLossSpec) -> Loss[dict[str, Tensor]]:
        """Return the loss of a micro-batch: sum of weight * (policy loss - entropy_coef * H + kl_coef * KL)."""
        assert batch.old_logprobs_BS is not None and batch.advantages_BS is not None
        old_BS, advantages_BS = batch.old_logprobs_BS, batch.advantages_BS
        num_tokens_B = batch.mask_BS.sum(-1)
        weights_B = token_weights_B(
            spec.loss_agg_mode, num_tokens_B, step.total_tokens, step.total_rollouts, max_tokens=spec.max_tokens
        )

        def loss(micro: MicroBatch, output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            scores, device = self.score(micro, output, spec.temperature), output.device
            weights_N, old_N = weights_B[micro.row_N].to(device), micro.column(old_BS).to(device)
            inputs = PolicyLossInputs(
                scores.logprobs_N,
                old_N,
                micro.column(advantages_BS).to(device),
                sequence_N=micro.row_N.to(device),
                num_sequences=len(batch),
                rollout_weights_N=_column(micro, batch.policy_weights_BS, device),
                selected_N=_column(micro, batch.selected_BS, device),
            )
            policy = token_loss(spec.name, inputs, spec.settings)
            total = policy_loss = (weights_N * policy.loss_N).sum()
            entropy = (weights_N * scores.entropy_N).sum()
            metrics = {
                "policy_loss": policy_loss,
                "entropy": entropy,
                "clip_fraction": (weights_N * policy.clipped_N).sum(),
                "old_kl": (weights_N * (old_N - scores.logprobs_N)).sum(),
            }
            if spec.entropy_coef:
                total = total - spec.entropy_coef * entropy
            if spec.kl_coef is not None:
                ref_N = _column(micro, batch.ref_logprobs_BS, device)
                assert ref_N is not None
                kl = (weights_N * kl_estimators.get(spec.kl_type)(scores.logprobs_N, ref_N)).sum()
                total = total + spec.kl_coef * kl
                metrics["kl"] = kl
            return total, detached({"loss": total, **metrics})

        return loss

    def _sft_loss(self, step: OptimizerStep) -> Loss[dict[str, Tensor]]:
        """Return the loss of a micro-batch: minus the log-probs of its masked tokens over those of the mini-batch."""

        def loss(micro: MicroBatch, output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            scores = self.score(micro, output, temperature=1.0)
            total = -scores.logprobs_N.sum() / step.total_tokens
            return total, detached({"loss": total, "entropy": scores.entropy_N.sum() / step.total_tokens})

        return loss


def _column(micro: MicroBatch, values_BS: Tensor | None, device: torch.device) -> Tensor | None:
    """Return a column of the batch at the micro-batch's tokens, if the batch has it."""
    return None if values_BS is None else micro.column(values_BS).to(device)
