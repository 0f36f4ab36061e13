"""Advantages: how much better each token did than expected.

Shape suffixes: B rollouts, S sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megarl.algorithm.registry import Registry


@dataclass(frozen=True)
class AdvantageInputs:
    """What estimators see of the rollouts of a step: all of them, since a group must never be split.

    A group may have any size and its rows any order. A rollout without trained tokens still counts in its group.
    """

    rewards_B: Tensor  # float, one score a rollout
    group_B: Tensor  # int64, rollouts of one prompt share a group
    mask_BS: Tensor  # bool, True on the tokens that are trained on


@dataclass(frozen=True)
class AdvantageSettings:
    """Settings of all estimators; each reads its own.

    norm_by_std: divide by the standard deviation of the group (grpo). epsilon: added to it, in units of reward.
    """

    norm_by_std: bool = True
    epsilon: float = 1e-6


@dataclass(frozen=True)
class Advantages:
    """What estimators return, zero outside the mask. Returns, the critic's targets, are None where it has none."""

    advantages_BS: Tensor
    returns_BS: Tensor | None = None


class Estimator(Protocol):
    """The signature of every advantage estimator."""

    def __call__(self, inputs: AdvantageInputs, settings: AdvantageSettings) -> Advantages: ...


estimators: Registry[Estimator] = Registry("algorithm.adv_estimator")


@estimators.register("grpo")
def grpo(inputs: AdvantageInputs, settings: AdvantageSettings) -> Advantages:
    """Normalise each reward by its group: A_i = (r_i - mean(r)) / (std(r) + epsilon), on every masked token.

    std is unbiased (divides by n - 1). Equal rewards give exactly zero, and so does a group of one. Without
    ``norm_by_std`` A_i = r_i - mean(r), which Dr. GRPO wants: the std favours prompts that are nearly always right
    or wrong. DeepSeekMath, arXiv:2402.03300, section 4.1; Dr. GRPO, arXiv:2503.20783.
    """
    deviation_B, size_B, index_B = _deviation_from_group_mean(inputs)
    if settings.norm_by_std:
        variance_B = _group_sum(deviation_B.square(), index_B) / (size_B - 1).clamp(min=1)
        deviation_B = deviation_B / (variance_B.sqrt() + settings.epsilon)
    return Advantages(_on_masked_tokens(deviation_B, inputs))


@estimators.register("rloo")
def rloo(inputs: AdvantageInputs, settings: AdvantageSettings) -> Advantages:
    """Subtract the mean of the others in the group: A_i = r_i - sum_{j != i} r_j / (n - 1), on every masked token.

    Equal to n / (n - 1) * (r_i - mean(r)), the form computed here. A group of one has no others and gives zero.
    Back to Basics, arXiv:2402.14740, section 2.2.
    """
    deviation_B, size_B, _ = _deviation_from_group_mean(inputs)
    return Advantages(_on_masked_tokens(deviation_B * size_B / (size_B - 1).clamp(min=1), inputs))


def _deviation_from_group_mean(inputs: AdvantageInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return each reward minus its group's mean, its group's size, and the dense number of its group (float64, B).

    Rewards are first shifted by the least of their group, so that equal ones cancel exactly whatever they are, and
    float64 keeps the order of the rows out of the float32 result.
    """
    rewards_B = inputs.rewards_B.double()
    index_B = torch.unique(inputs.group_B, return_inverse=True)[1]
    least_B = torch.zeros_like(rewards_B).scatter_reduce(0, index_B, rewards_B, "amin", include_self=False)
    shifted_B = rewards_B - least_B[index_B]
    size_B = _group_sum(torch.ones_like(rewards_B), index_B)
    return shifted_B - _group_sum(shifted_B, index_B) / size_B, size_B, index_B


def _group_sum(values_B: Tensor, index_B: Tensor) -> Tensor:
    """Return for each row the sum over its group. There are at most as many groups as rows."""
    return torch.zeros_like(values_B).index_add(0, index_B, values_B)[index_B]


def _on_masked_tokens(advantage_B: Tensor, inputs: AdvantageInputs) -> Tensor:
    """Give every masked token the advantage of its rollout, and every other zero, in the dtype of the rewards."""
    advantage_B1 = advantage_B.to(inputs.rewards_B.dtype).unsqueeze(1)
    return torch.where(inputs.mask_BS, advantage_B1, torch.zeros_like(advantage_B1))
