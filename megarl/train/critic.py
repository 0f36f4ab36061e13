"""The critic: a model with a value head, trained to predict returns."""

from __future__ import annotations

from torch import Tensor

from megarl.algorithm.aggregate import token_weights_B
from megarl.algorithm.loss_specs import ValueLossSpec
from megarl.algorithm.value_loss import clipped_value_loss
from megarl.batching.pack import MicroBatch
from megarl.train.backend import Backend, Loss, Output
from megarl.train.scoring import score_tokens
from megarl.train.updating import detached, take_steps
from megarl.train.work import OptimizerStep, ScoreWork, Updated, UpdateWork
from megarl.types import ValueBatch


class Critic:
    """A trainable value function on a backend."""

    def __init__(self, backend: Backend) -> None:
        assert backend.role.shape.value_head
        self.backend = backend

    def score(self, work: ScoreWork) -> Tensor | None:
        """Return values [B, S] on the ranks that report results, else None.

        The value at a masked token is that of the state before it: of the prompt and the response up to there.
        """
        return score_tokens(self.backend, work.sequences, work.micro_batches, lambda _, output: output.values())

    def update(self, work: UpdateWork) -> Updated:
        """Take optimizer steps towards ``returns_BS``; metrics are as those of the actor's update."""
        assert isinstance(work.loss, ValueLossSpec) and isinstance(work.batch, ValueBatch)
        spec, batch = work.loss, work.batch
        return Updated(take_steps(self.backend, work, lambda step: _value_loss(spec, batch, step)))


def _value_loss(spec: ValueLossSpec, batch: ValueBatch, step: OptimizerStep) -> Loss:
    """Return the loss of a micro-batch: sum over tokens of weight * clipped squared error."""
    weights_B = token_weights_B(
        spec.loss_agg_mode, batch.mask_BS.sum(-1), step.total_tokens, step.total_rollouts, max_tokens=spec.max_tokens
    )

    def loss(micro: MicroBatch, output: Output) -> tuple[Tensor, dict[str, Tensor]]:
        values_N, device = output.values(), output.device
        old_N, returns_N = micro.column(batch.values_BS).to(device), micro.column(batch.returns_BS).to(device)
        error = clipped_value_loss(values_N, old_N, returns_N, clip_range=spec.clip_range)
        weights_N = weights_B[micro.row_N].to(device)
        total = (weights_N * error.loss_N).sum()
        clipped, mean = (weights_N * error.clipped_N).sum(), (weights_N * values_N).sum()
        return total, detached({"value_loss": total, "clip_fraction": clipped, "value_mean": mean})

    return loss
