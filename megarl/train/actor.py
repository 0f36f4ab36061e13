"""The actor: the policy that is trained, by PPO-style losses on rollouts or by SFT on demonstrations."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from megarl.algorithm.aggregate import token_weights_B
from megarl.algorithm.kl import kl_estimators
from megarl.algorithm.policy_loss import policy_losses
from megarl.data.batch import MicroBatch
from megarl.errors import WorkerError
from megarl.model.weights import TensorSource
from megarl.train.model import Loss, Model, ModelSpec, TokenScores
from megarl.train.optimizer import Optimizer, OptimizerSpec
from megarl.train.work import Metrics, OptimizerStep, PolicyLossSpec
from megarl.types import Batch


class Actor(Model):
    """A trainable policy."""

    def __init__(self, spec: ModelSpec, source: TensorSource, optimizer: OptimizerSpec) -> None:
        super().__init__(spec, source)
        self.optimizer = Optimizer(self, optimizer)

    def update(self, batch: Batch, steps: Sequence[OptimizerStep], loss: PolicyLossSpec) -> list[Metrics]:
        """Take optimizer steps on rollouts; return the metrics of each, this data-parallel rank's share of each sum.

        ``batch`` needs old_logprobs_BS and advantages_BS, and ref_logprobs_BS where ``loss.kl_coef`` isn't None.
        Metrics but grad_norm and lr are sums normalised by the whole mini-batch: over data-parallel ranks they add up.
        """
        return [self._step(batch, step, _policy_loss(batch, step, loss), loss.temperature) for step in steps]

    def update_sft(self, batch: Batch, steps: Sequence[OptimizerStep]) -> list[Metrics]:
        """Take optimizer steps on demonstrations: minus the mean log-prob of the masked tokens."""
        return [self._step(batch, step, _sft_loss(batch, step)) for step in steps]

    def evaluate_sft(self, batch: Batch, step: OptimizerStep) -> Metrics:
        """Return the SFT loss without training."""
        self.module.eval()
        with torch.no_grad():
            return _summed(self.run(batch, step.micro_batches, _sft_loss(batch, step), forward_only=True))

    def _step(
        self, batch: Batch, step: OptimizerStep, loss: Loss[dict[str, Tensor]], temperature: float = 1.0
    ) -> Metrics:
        self.module.train()
        self.optimizer.zero_grad()
        metrics = _summed(self.run(batch, step.micro_batches, loss, temperature=temperature, forward_only=False))
        report = self.optimizer.step()
        if not math.isfinite(report.grad_norm):
            raise WorkerError(
                f"the gradient norm is {report.grad_norm}: the update would destroy the weights. Lower optim.lr, raise "
                "lr_scheduler.warmup_steps, or look for non-finite rewards and log-probs in metrics.jsonl"
            )
        return metrics | {"grad_norm": report.grad_norm, "lr": report.lr}


def _policy_loss(batch: Batch, step: OptimizerStep, spec: PolicyLossSpec) -> Loss[dict[str, Tensor]]:
    """Return the loss of a micro-batch: sum over tokens of weight * (policy loss + kl_coef * KL)."""
    assert batch.old_logprobs_BS is not None and batch.advantages_BS is not None
    old_BS, advantages_BS, ref_BS = batch.old_logprobs_BS, batch.advantages_BS, batch.ref_logprobs_BS
    weights_B = token_weights_B(spec.loss_agg_mode, batch.mask_BS.sum(-1), step.total_tokens, step.total_rollouts)
    per_token = policy_losses.get("ppo_clip")

    def loss(micro: MicroBatch, scores: TokenScores) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs_N = scores.logprobs_N
        device = logprobs_N.device
        weights_N, old_N = weights_B[micro.row_N].to(device), micro.column(old_BS).to(device)
        policy = per_token(
            logprobs_N, old_N, micro.column(advantages_BS).to(device), clip_low=spec.clip_low, clip_high=spec.clip_high
        )
        total = policy_loss = (weights_N * policy.loss).sum()
        metrics = {
            "policy_loss": policy_loss,
            "entropy": (weights_N * scores.entropy_N).sum(),
            "clip_fraction": (weights_N * policy.clipped).sum(),
            "old_kl": (weights_N * (old_N - logprobs_N)).sum(),
        }
        if spec.kl_coef is not None:
            assert ref_BS is not None
            kl = (weights_N * kl_estimators.get(spec.kl_type)(logprobs_N, micro.column(ref_BS).to(device))).sum()
            total = total + spec.kl_coef * kl
            metrics["kl"] = kl
        return total, _detached({"loss": total, **metrics})

    return loss


def _sft_loss(batch: Batch, step: OptimizerStep) -> Loss[dict[str, Tensor]]:
    """Return the loss of a micro-batch: minus the log-probs of its masked tokens over those of the mini-batch."""

    def loss(micro: MicroBatch, scores: TokenScores) -> tuple[Tensor, dict[str, Tensor]]:
        total = -scores.logprobs_N.sum() / step.total_tokens
        return total, _detached({"loss": total, "entropy": scores.entropy_N.sum() / step.total_tokens})

    return loss


def _detached(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    # Copies, since Megatron scales the loss tensor in place.
    return {name: value.detach().clone() for name, value in metrics.items()}


def _summed(results: Sequence[dict[str, Tensor]]) -> Metrics:
    """Add up the micro-batches' shares; empty on ranks that aren't on the last stage."""
    sums: dict[str, float] = defaultdict(float)
    for result in results:
        for name, value in result.items():
            sums[name] += float(value)
    return dict(sums)
