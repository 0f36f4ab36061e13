"""The reward model: a frozen model with a value head, whose output at a rollout's last token is the rollout's score."""

from __future__ import annotations

from torch import Tensor

from megarl.errors import WorkerError
from megarl.train.backend import Backend
from megarl.train.scoring import score_rows
from megarl.train.work import ScoreWork


class RewardModel:
    """A frozen judge of whole rollouts on a backend."""

    def __init__(self, backend: Backend) -> None:
        assert backend.role.shape.value_head
        self.backend = backend

    def score(self, work: ScoreWork) -> Tensor | None:
        """Return the scores of the rollouts, as float32 [B], on the ranks that report results, else None.

        Raises WorkerError where one is no finite number.
        """
        scores_B = score_rows(self.backend, work.sequences, work.micro_batches, lambda _, output: output.scores())
        if scores_B is not None and not scores_B.isfinite().all():
            bad = int((~scores_B.isfinite()).sum())
            raise WorkerError(
                f"the reward model gave {bad} of {len(scores_B)} rollouts a score that is no finite number. Check its "
                "weights in transformers, or set actor_rollout_ref.model.dtype=float32"
            )
        return scores_B
