"""Advantages: how much better each token did than expected. Every estimator by the name that selects it.

Shape suffixes: B rollouts, S sequence, K components of a reward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megarl.algorithm.group import Groups, groups_of
from megarl.algorithm.registry import Registry
from megarl.algorithm.returns import generalized_advantages, rewards_to_go, whitened
from megarl.algorithm.token_rewards import on_last_token
from megarl.catalog import ESTIMATORS
from megarl.catalog import Needs as Needs  # users' files take it from here, beside the registry
from megarl.errors import AlgorithmError


@dataclass(frozen=True)
class AdvantageInputs:
    """What estimators see of the rollouts of a step: all of them, since a group must never be split.

    A group may have any size and its rows any order. A rollout without trained tokens still counts in its group.
    """

    rewards_B: Tensor  # float, one score a rollout
    group_B: Tensor  # int64, rollouts of one prompt share a group
    mask_BS: Tensor  # bool, True on the tokens that are trained on
    token_rewards_BS: Tensor | None = None  # float, see token_rewards; None: the score on the last masked token
    values_BS: Tensor | None = None  # float, by the critic: what it expected when the token was about to be sampled
    baseline_B: Tensor | None = None  # float, the reward of the greedy rollout of the row's prompt
    components_BK: Tensor | None = None  # float, the parts of the reward that algorithm.gdpo_reward_keys names


@dataclass(frozen=True)
class AdvantageSettings:
    """Settings of all estimators; each reads its own.

    norm_by_std: divide by the standard deviation of the group (grpo, grpo_passk, gdpo). epsilon: added to it, in units
    of reward. gamma: discount of a token's later rewards (gae, reinforce_plus_plus). lam: weight of later temporal
    differences (gae); 1 trusts the rewards alone, 0 the critic. component_weights: of the parts of the reward (gdpo);
    None weighs all alike.
    """

    norm_by_std: bool = True
    epsilon: float = 1e-6
    gamma: float = 1.0
    lam: float = 1.0
    component_weights: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Advantages:
    """What estimators return, zero outside the mask. Returns, the critic's targets, are None where it has none."""

    advantages_BS: Tensor
    returns_BS: Tensor | None = None


class Estimator(Protocol):
    """The signature of every advantage estimator."""

    def __call__(self, inputs: AdvantageInputs, settings: AdvantageSettings) -> Advantages: ...


class EstimatorRegistry(Registry[Estimator]):
    """Estimators by name, each with what it needs."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self._needs: dict[str, Needs] = {}

    def register(self, name: str, needs: Needs | None = None) -> Callable[[Estimator], Estimator]:
        """Enter the decorated estimator under ``name``. Raises ConfigError where the name is taken.

        needs: of an estimator that megarl.catalog doesn't name; rewards alone unless given.
        """
        enter = super().register(name)

        def enter_with_needs(entry: Estimator) -> Estimator:
            entered = enter(entry)
            self._needs[name] = needs or ESTIMATORS.get(name, Needs())
            return entered

        return enter_with_needs

    def needs(self, name: str) -> Needs:
        """Return the Needs of the estimator called ``name``. Raises ConfigError with the nearest known name."""
        self.get(name)
        return self._needs[name]


estimators = EstimatorRegistry("algorithm.adv_estimator")


def estimate_advantages(name: str, inputs: AdvantageInputs, settings: AdvantageSettings) -> Advantages:
    """Return the advantages by the estimator called ``name``, in the dtype of the rewards.

    Raises ConfigError for an unknown name, and AlgorithmError where there isn't a finite number for every masked token,
    or values but no returns for their critic to learn.
    """
    found, dtype = estimators.get(name)(inputs, settings), inputs.rewards_B.dtype
    if not isinstance(found, Advantages):
        raise AlgorithmError(f"estimator {name} must return Advantages, not a {type(found).__name__}")
    if inputs.values_BS is not None and found.returns_BS is None:
        raise AlgorithmError(f"estimator {name} gave no returns_BS, which the critic learns from")
    for field, value_BS in (("advantages_BS", found.advantages_BS), ("returns_BS", found.returns_BS)):
        if value_BS is None:
            continue
        if value_BS.shape != inputs.mask_BS.shape:
            shapes = f"{tuple(value_BS.shape)}, must be {tuple(inputs.mask_BS.shape)}"
            raise AlgorithmError(f"estimator {name} gave {field} of shape {shapes}: rollouts x sequence")
        if num_bad := int((~value_BS.isfinite() & inputs.mask_BS).sum()):
            raise AlgorithmError(f"estimator {name} gave {field} that are NaN or infinite on {num_bad} tokens")
    return Advantages(found.advantages_BS.to(dtype), None if found.returns_BS is None else found.returns_BS.to(dtype))


@estimators.register("gae")
def gae(inputs: AdvantageInputs, settings: AdvantageSettings) -> Advantages:
    """Weigh the critic's temporal differences, then whiten: A_t = sum_{k >= t} (gamma lam)^(k - t) delta_k.

    delta_t = r_t + gamma V_{t+1} - V_t along the masked tokens, V = 0 after the last; returns A_t + V_t are taken
    before whitening. Whitening is over all masked tokens of the step, as PPO implementations do. GAE,
    arXiv:1506.02438; PPO, arXiv:1707.06347.
    """
    assert inputs.values_BS is not None, "gae needs the critic's values"
    rewards_BS, mask_BS = _token_rewards(inputs), inputs.mask_BS
    advantages_BS, returns_BS = generalized_advantages(
        rewards_BS, inputs.values_BS, mask_BS, settings.gamma, settings.lam
    )
    dtype = inputs.rewards_B.dtype
    return Advantages(whitened(advantages_BS, mask_BS).to(dtype), returns_BS.to(dtype))


@estimators.register("grpo")
def grpo(inputs: AdvantageInputs, settings: AdvantageSettings) -> Advantages:
    """Normalise each reward by its group: A_i = (r_i - mean(r)) / (std(r) + epsilon), on every masked token.

    std is unbiased (divides by n - 1). Equal rewards give exactly zero, and so does a group of one. Without
    ``norm_by_std`` A_i = r_i - mean(r), which Dr. GRPO wants: the std favours prompts that are nearly always right
    or wrong. DeepSeekMath, arXiv:2402.03300, section 4.1; Dr. GRPO, arXiv:2503.20783.
    """
    rewards_B, groups = _outcomes(inputs)
    return _on_masked_tokens(_over_std(groups.deviation(rewards_B), rewards_B, groups, settings), inputs)


@estimators.register("rloo")
def rloo(inputs: AdvantageInputs, settings: AdvantageSettings) -> Advantages:
    """Subtract the mean of the others in the group: A_i = r_i - sum_{j != i} r_j / (n - 1), on every masked token.

    Equal to n / (n - 1) * (r_i - mean(r)), the form computed here. A group of one has no others and gives zero.
    Back to Basics, arXiv:2402.14740, section 2.2.
    """
    rewards_B, groups = _outcomes(inputs)
    size_B = groups.size_B
    return _on_masked_tokens(groups.deviation(rewards_B) * size_B / (size_B - 1).clamp(min=1), inputs)


@estimators.register("remax")
def remax(inputs: AdvantageInputs, settings: AdvantageSettings) -> Advantages:
    """Subtract the reward of the prompt's greedy rollout: A_t = sum_{k >= t} r_k - b, on every masked token.

    Without KL in the reward that is the score minus b on every token. ReMax, arXiv:2310.10505.
    """
    assert inputs.baseline_B is not None, "remax needs the rewards of greedy rollouts"
    mask_BS, baseline_B1 = inputs.mask_BS, inputs.baseline_B.double().unsqueeze(1)
    advantages_BS = rewards_to_go(_token_rewards(inputs), mask_BS, discount=1.0) - baseline_B1
    advantages_BS = torch.where(mask_BS, advantages_BS, torch.zeros_like(advantages_BS))
    return Advantages(advantages_BS.to(inputs.rewards_B.dtype))


@estimators.register("reinforce_plus_plus")
def reinforce_plus_plus(inputs: AdvantageInputs, settings: AdvantageSettings) -> Advantages:
    """Whiten the returns over the step: G_t = sum_{k >= t} gamma^(k - t) r_k, A = (G - mean(G)) / std(G).

    Mean and std are those of all masked tokens of the step, so a prompt needs one rollout alone; the KL to the
    reference belongs into r. REINFORCE++, arXiv:2501.03262.
    """
    returns_BS = rewards_to_go(_token_rewards(inputs), inputs.mask_BS, settings.gamma)
    return Advantages(whitened(returns_BS, inputs.mask_BS).to(inputs.rewards_B.dtype))


@estimators.register("reinforce_plus_plus_baseline")
def reinforce_plus_plus_baseline(inputs: AdvantageInputs, settings: AdvantageSettings) -> Advantages:
    """Subtract the group's mean, then whiten over the step: A' = r_i - mean(r), A = (A' - mean(A')) / std(A').

    The first mean is the group's, the others are those of all masked tokens of the step: unlike grpo's std, which
    differs by prompt, one scale serves all. REINFORCE++, arXiv:2501.03262, its variant with a baseline.
    """
    rewards_B, groups = _outcomes(inputs)
    deviation_BS = groups.deviation(rewards_B).unsqueeze(1).expand(inputs.mask_BS.shape)
    return Advantages(whitened(deviation_BS, inputs.mask_BS).to(inputs.rewards_B.dtype))


@estimators.register("opo")
def opo(inputs: AdvantageInputs, settings: AdvantageSettings) -> Advantages:
    """Subtract the baseline of least variance: A_i = r_i - sum_j l_j r_j / sum_j l_j, on every masked token.

    l_j is the number of masked tokens of rollout j of the group, to which the square of its gradient is taken to be
    proportional. OPO, arXiv:2505.23585.
    """
    rewards_B, groups = _outcomes(inputs)
    return _on_masked_tokens(groups.deviation(rewards_B, inputs.mask_BS.sum(-1).double()), inputs)


@estimators.register("gpg")
def gpg(inputs: AdvantageInputs, settings: AdvantageSettings) -> Advantages:
    """Subtract the group's mean and make up for groups without spread: A_i = B / (B - M) * (r_i - mean(r)).

    Of the B rollouts of the step, M are in groups whose rewards are all equal. They have no gradient, but count in
    the mean of the loss, which would shrink it by (B - M) / B. GPG, arXiv:2504.02546, with F_norm = 1.
    """
    rewards_B, groups = _outcomes(inputs)
    num_informative = groups.has_spread(rewards_B).sum().clamp(min=1)
    return _on_masked_tokens(groups.deviation(rewards_B) * len(rewards_B) / num_informative, inputs)


@estimators.register("grpo_passk")
def grpo_passk(inputs: AdvantageInputs, settings: AdvantageSettings) -> Advantages:
    """Credit the best of a group alone, with its lead: A_best = (r_best - r_second) / (std(r) + epsilon).

    All others get zero, and so does everyone where two are best, since without either the group is as good. Without
    ``norm_by_std`` the lead isn't divided. Pass@k training, arXiv:2503.19595.
    """
    rewards_B, groups = _outcomes(inputs)
    best_B = rewards_B == groups.largest(rewards_B)
    without_best_B = torch.where(best_B, groups.least(rewards_B), rewards_B)
    lead_B = rewards_B - groups.largest(without_best_B)
    is_alone_B = best_B & (groups.sum(best_B.double()) == 1)
    # NaN is no one's best; kept, so that it shows.
    lead_B = torch.where(is_alone_B | lead_B.isnan(), lead_B, torch.zeros_like(lead_B))
    return _on_masked_tokens(_over_std(lead_B, rewards_B, groups, settings), inputs)


@estimators.register("gdpo")
def gdpo(inputs: AdvantageInputs, settings: AdvantageSettings) -> Advantages:
    """Normalise each component of the reward by its group, add them up, and normalise the sums over the step.

    S_i = sum_k w_k (r_ik - mean(r_k)) / (std(r_k) + epsilon), with the statistics of the group; A_i = (S_i - mean(S)) /
    (std(S) + epsilon) on every masked token, with those of all rollouts of the step. Components count by w_k, whatever
    their scale, and different ones give different advantages where the sums of rewards are equal. Without
    ``norm_by_std`` components aren't divided. GDPO, arXiv:2601.05242, section 3. (verl's second mean and std are over
    tokens, where long responses weigh more.)
    """
    assert inputs.components_BK is not None, "gdpo needs the components of the reward"
    components_BK, groups = inputs.components_BK.double(), groups_of(inputs.group_B)
    weights = settings.component_weights or (1.0,) * components_BK.shape[1]
    sum_B = torch.zeros(len(components_BK), dtype=torch.float64, device=components_BK.device)
    for weight, reward_B in zip(weights, components_BK.T, strict=True):
        sum_B = sum_B + weight * _over_std(groups.deviation(reward_B), reward_B, groups, settings)
    everyone = groups_of(torch.zeros_like(inputs.group_B))
    return _on_masked_tokens(everyone.deviation(sum_B) / (everyone.std(sum_B) + settings.epsilon), inputs)


def _token_rewards(inputs: AdvantageInputs) -> Tensor:
    if inputs.token_rewards_BS is not None:
        return inputs.token_rewards_BS
    return on_last_token(inputs.rewards_B, inputs.mask_BS)


def _outcomes(inputs: AdvantageInputs) -> tuple[Tensor, Groups]:
    """Return one reward a rollout (float64, B), the sum of those of its tokens, and the groups.

    A rollout without masked tokens has its score alone. float64 keeps the order of rows out of the float32 result.
    """
    rewards_B, mask_BS = inputs.rewards_B.double(), inputs.mask_BS
    if inputs.token_rewards_BS is not None:
        tokens_BS = inputs.token_rewards_BS.double()
        sum_B = torch.where(mask_BS, tokens_BS, torch.zeros_like(tokens_BS)).sum(-1)
        rewards_B = torch.where(mask_BS.any(-1), sum_B, rewards_B)
    return rewards_B, groups_of(inputs.group_B)


def _over_std(values_B: Tensor, rewards_B: Tensor, groups: Groups, settings: AdvantageSettings) -> Tensor:
    return values_B / (groups.std(rewards_B) + settings.epsilon) if settings.norm_by_std else values_B


def _on_masked_tokens(advantage_B: Tensor, inputs: AdvantageInputs) -> Advantages:
    """Give every masked token the advantage of its rollout, and every other zero, in the dtype of the rewards."""
    advantage_B1 = advantage_B.to(inputs.rewards_B.dtype).unsqueeze(1)
    return Advantages(torch.where(inputs.mask_BS, advantage_B1, torch.zeros_like(advantage_B1)))
