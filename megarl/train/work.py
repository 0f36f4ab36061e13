"""What the controller asks of the roles on a rank, and what it hears back. The controller loads no Megatron.

Shape suffixes: B rollouts, S sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megarl.algorithm.loss_specs import LossSpec
from megarl.types import Metrics, Sequences

if TYPE_CHECKING:
    from torch import Tensor

Micros = tuple[tuple[int, ...], ...]
"""Row indices of every micro-batch."""


SKIPPED = "num_skipped"
"""The metric of optimizer steps that were not taken, since their gradient isn't finite or is too large."""


def is_whole(metric: str) -> bool:
    """Whether every rank has the whole number; all other metrics of a rank are its share of a sum over all of them."""
    return metric in ("grad_norm", "lr", SKIPPED) or metric.startswith("moe/")


@dataclass(frozen=True)
class OptimizerStep:
    """The work of one rank in one optimizer step.

    micro_batches: row indices into this rank's sequences. total_tokens, total_rollouts: of the whole mini-batch, over
    all data-parallel ranks, to normalise by; num_rollouts: with those that no token is trained of. is_on_policy:
    whether its own log-probs, detached, are the old ones.
    """

    micro_batches: Micros
    total_tokens: int
    total_rollouts: int
    num_rollouts: int
    is_on_policy: bool = False


@dataclass(frozen=True)
class ScoreWork:
    """A pass of a role over the rows of one data-parallel rank. temperature: of a policy's log-probs."""

    role: str
    sequences: Sequences
    micro_batches: Micros
    temperature: float = 1.0


@dataclass(frozen=True)
class UpdateWork:
    """The optimizer steps of a role over the rows of one data-parallel rank."""

    role: str
    batch: Sequences
    steps: tuple[OptimizerStep, ...]
    loss: LossSpec


@dataclass(frozen=True)
class Updated:
    """What a rank tells of an update.

    metrics: of every optimizer step, this data-parallel rank's share of each sum. logprobs_BS: of the rows of steps on
    policy, None where there are no such.
    """

    metrics: tuple[Metrics, ...]
    logprobs_BS: Tensor | None = None
