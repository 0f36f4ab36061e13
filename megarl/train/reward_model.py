"""The reward model: a frozen model with a value head, whose output at a rollout's last token is the rollout's score.

Shape suffixes: B rollouts, R rows of a micro-batch, M those whose last token this context rank has, L positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megarl.batching.pack import MicroBatch
from megarl.errors import WorkerError
from megarl.train.megatron.model import Model, ModelSpec
from megarl.types import Batch
from megarl.weights.sources import TensorSource


class RewardModel(Model):
    """A frozen judge of whole rollouts."""

    def __init__(self, spec: ModelSpec, source: TensorSource) -> None:
        assert spec.shape.value_head
        super().__init__(spec, source)

    def scores(self, batch: Batch, micro_batches: Sequence[Sequence[int]]) -> Tensor | None:
        """Return the scores of the rollouts, as float32 [B], on the ranks that report results, else None.

        Raises WorkerError where one is no finite number.
        """
        results = self.score_micro_batches(batch, micro_batches, self._scores)
        if not self.groups.is_output_rank:
            return None
        scores_B = torch.zeros(len(batch))
        for micro, scores_R in results:
            scores_B[micro.row_R] = scores_R
        if not scores_B.isfinite().all():
            bad = int((~scores_B.isfinite()).sum())
            raise WorkerError(
                f"the reward model gave {bad} of {len(batch)} rollouts a score that is no finite number. Check its "
                "weights in transformers, or set actor_rollout_ref.model.dtype=float32"
            )
        return scores_B

    def _scores(self, micro: MicroBatch, output: Tensor) -> Tensor:
        """Return the scores [R] from the value head's output [.., L, 1]."""
        own_M = micro.last_R[micro.last_R >= 0].to(output.device)
        (scores_R,) = self.of_all_ranks(micro.last_R, output.flatten()[own_M].float())
        return scores_R
