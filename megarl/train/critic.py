"""The critic: a model with a value head, trained to predict returns.

Shape suffixes: B rollouts, S sequence, N tokens that count, M those of this context rank.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megarl.algorithm.aggregate import token_weights_B
from megarl.algorithm.value_loss import clipped_value_loss
from megarl.batching.pack import MicroBatch
from megarl.train.megatron.model import Loss, Model, ModelSpec
from megarl.train.megatron.optimizer import Optimizer, OptimizerSpec, detached
from megarl.train.work import Metrics, OptimizerStep, ValueLossSpec
from megarl.types import Batch
from megarl.weights.sources import TensorSource


class Critic(Model):
    """A trainable value function."""

    def __init__(self, spec: ModelSpec, source: TensorSource, optimizer: OptimizerSpec) -> None:
        assert spec.shape.value_head
        super().__init__(spec, source)
        self.optimizer = Optimizer(self, optimizer)

    def values(self, batch: Batch, micro_batches: Sequence[Sequence[int]]) -> Tensor | None:
        """Return values [B, S] on the ranks that report results, else None.

        The value at a masked token is that of the state before it: of the prompt and the response up to there.
        """
        return self.score_tokens(batch, micro_batches, self._values)

    def update(self, batch: Batch, steps: Sequence[OptimizerStep], loss: ValueLossSpec) -> list[Metrics]:
        """Take optimizer steps towards ``returns_BS``; return the metrics of each, as the actor's update does."""
        with self.optimizer.resident():
            return [self.optimizer.train(batch, step, self._value_loss(batch, step, loss)) for step in steps]

    def _values(self, micro: MicroBatch, output: Tensor) -> Tensor:
        """Return the values [N] from the value head's output [.., L, 1]."""
        own_M = micro.predict_N[micro.predict_N >= 0].to(output.device)
        (values_N,) = self.of_all_ranks(micro.predict_N, output.flatten()[own_M].float())
        return values_N

    def _value_loss(self, batch: Batch, step: OptimizerStep, spec: ValueLossSpec) -> Loss[dict[str, Tensor]]:
        """Return the loss of a micro-batch: sum over tokens of weight * clipped squared error."""
        assert batch.values_BS is not None and batch.returns_BS is not None
        old_BS, returns_BS = batch.values_BS, batch.returns_BS
        weights_B = token_weights_B(
            spec.loss_agg_mode,
            batch.mask_BS.sum(-1),
            step.total_tokens,
            step.total_rollouts,
            max_tokens=spec.max_tokens,
        )

        def loss(micro: MicroBatch, output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            values_N, device = self._values(micro, output), output.device
            old_N, returns_N = micro.column(old_BS).to(device), micro.column(returns_BS).to(device)
            error = clipped_value_loss(values_N, old_N, returns_N, clip_range=spec.clip_range)
            weights_N = weights_B[micro.row_N].to(device)
            total = (weights_N * error.loss_N).sum()
            clipped, mean = (weights_N * error.clipped_N).sum(), (weights_N * values_N).sum()
            return total, detached({"value_loss": total, "clip_fraction": clipped, "value_mean": mean})

        return loss
