"""A frozen policy: the reference that KL terms compare with."""

from __future__ import annotations

from torch import Tensor

from megarl.train.backend import Backend
from megarl.train.scoring import token_logprobs
from megarl.train.work import ScoreWork


class Reference:
    """A frozen policy on a backend."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def score(self, work: ScoreWork) -> Tensor | None:
        """Return log-probs [B, S] of the masked tokens on the ranks that report results, else None."""
        return token_logprobs(self.backend, work)
