"""What the controller asks of a role that trains, and what it hears back. The controller loads no Megatron."""

from __future__ import annotations

from dataclasses import dataclass

Metrics = dict[str, float]


@dataclass(frozen=True)
class PolicyLossSpec:
    """The loss of a policy update: clipped PPO, and KL to the reference where ``kl_coef`` isn't None.

    temperature: of the sampling, which the log-probs share.
    """

    clip_low: float
    clip_high: float
    loss_agg_mode: str
    kl_coef: float | None
    kl_type: str
    temperature: float


@dataclass(frozen=True)
class ValueLossSpec:
    """The loss of a critic's update. clip_range: how far a value may move from that of the rollout before it counts."""

    clip_range: float
    loss_agg_mode: str


@dataclass(frozen=True)
class OptimizerStep:
    """One rank's work in one optimizer step.

    micro_batches: row indices into this rank's Batch. total_tokens, total_rollouts: of the whole mini-batch, over all
    data-parallel ranks, to normalise by.
    """

    micro_batches: tuple[tuple[int, ...], ...]
    total_tokens: int
    total_rollouts: int
