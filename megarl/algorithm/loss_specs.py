"""The losses of a run with all their settings: what the controller tells the roles that train."""

from __future__ import annotations

from dataclasses import dataclass

from megarl.algorithm.policy_loss import PolicyLossSettings
from megarl.algorithm.rollout_correction import CorrectionSettings


@dataclass(frozen=True)
class PolicyLossSpec:
    """The loss of a policy update.

    settings: of the policy loss called ``name``. max_tokens: of the longest response that can be, which one
    loss_agg_mode divides by. kl_coef: of the KL to the reference; None: no such term. entropy_coef: of the entropy,
    which is subtracted. temperature: of the sampling, which the log-probs share. correction: what every optimizer step
    does about the engine's log-probs; None: nothing.
    """

    settings: PolicyLossSettings
    loss_agg_mode: str
    kl_coef: float | None
    kl_type: str
    temperature: float
    name: str = "ppo_clip"
    entropy_coef: float = 0.0
    correction: CorrectionSettings | None = None
    max_tokens: int | None = None


@dataclass(frozen=True)
class ValueLossSpec:
    """The loss of a critic's update. clip_range: how far a value may move from that of the rollout before it counts."""

    clip_range: float
    loss_agg_mode: str
    max_tokens: int | None = None


@dataclass(frozen=True)
class DemonstrationLossSpec:
    """The loss on demonstrations: minus the mean log-prob of the tokens that count, at temperature 1."""


LossSpec = PolicyLossSpec | ValueLossSpec | DemonstrationLossSpec
