"""What the controller asks of a role that trains, and what it hears back. The controller loads no Megatron."""

from __future__ import annotations

from dataclasses import dataclass

from megarl.algorithm.policy_loss import PolicyLossSettings

Metrics = dict[str, float]
"""Numbers by name; a rank's are its share of sums over data-parallel ranks, but for those that all ranks know whole."""


def is_whole(metric: str) -> bool:
    """Whether every rank has the whole number, not a share of it."""
    return metric in ("grad_norm", "lr") or metric.startswith("moe/")


@dataclass(frozen=True)
class PolicyLossSpec:
    """The loss of a policy update.

    settings: of the policy loss called ``name``. max_tokens: of the longest response that can be, which one
    loss_agg_mode divides by. kl_coef: of the KL to the reference; None: no such term. entropy_coef: of the entropy,
    which is subtracted. temperature: of the sampling, which the log-probs share.
    """

    settings: PolicyLossSettings
    loss_agg_mode: str
    kl_coef: float | None
    kl_type: str
    temperature: float
    name: str = "ppo_clip"
    entropy_coef: float = 0.0
    max_tokens: int | None = None


@dataclass(frozen=True)
class ValueLossSpec:
    """The loss of a critic's update. clip_range: how far a value may move from that of the rollout before it counts."""

    clip_range: float
    loss_agg_mode: str
    max_tokens: int | None = None


@dataclass(frozen=True)
class OptimizerStep:
    """One rank's work in one optimizer step.

    micro_batches: row indices into this rank's Batch. total_tokens, total_rollouts: of the whole mini-batch, over all
    data-parallel ranks, to normalise by.
    """

    micro_batches: tuple[tuple[int, ...], ...]
    total_tokens: int
    total_rollouts: int
