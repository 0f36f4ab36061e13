"""Estimators of megarl.algorithm.advantage again: float64 NumPy loops from the papers, sharing no code with it."""

from __future__ import annotations

import math

import numpy as np

from tests.unit.numpy_reference import Bools, Floats, Ints


def members(rewards: Floats, groups: Ints, row: int) -> list[float]:
    """Return the rewards of the group of ``row``."""
    return [float(r) for r, g in zip(rewards, groups, strict=True) if g == groups[row]]


def on_tokens(values: list[float], mask: Bools) -> Floats:
    """Return [B, S]: the value of each row on its masked tokens."""
    result = np.zeros(mask.shape)
    for row, value in enumerate(values):
        result[row][mask[row]] = value
    return result


def whiten(values: Floats, mask: Bools) -> Floats:
    """Return (x - mean) / sqrt(unbiased variance + 1e-8) over all masked tokens."""
    result = np.zeros(mask.shape)
    flat = [float(v) for v in values[mask]]
    if len(set(flat)) < 2:
        return result
    mean = math.fsum(flat) / len(flat)
    variance = math.fsum((v - mean) ** 2 for v in flat) / (len(flat) - 1)
    result[mask] = [(v - mean) / math.sqrt(variance + 1e-8) for v in flat]
    return result


def gae(rewards: Floats, values: Floats, mask: Bools, gamma: float, lam: float) -> tuple[Floats, Floats]:
    """Return advantages before whitening, and returns. arXiv:1506.02438, equation 16, summed term by term."""
    advantages, returns = np.zeros(mask.shape), np.zeros(mask.shape)
    for row in range(len(mask)):
        places = np.flatnonzero(mask[row])
        v = [float(values[row, s]) for s in places] + [0.0]
        deltas = [float(rewards[row, s]) + gamma * v[t + 1] - v[t] for t, s in enumerate(places)]
        for t, s in enumerate(places):
            advantages[row, s] = math.fsum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:]))
            returns[row, s] = advantages[row, s] + v[t]
    return advantages, returns


def rewards_to_go(rewards: Floats, mask: Bools, gamma: float) -> Floats:
    """Return the discounted sum of the rewards from each masked token on."""
    result = np.zeros(mask.shape)
    for row in range(len(mask)):
        places = np.flatnonzero(mask[row])
        for t, s in enumerate(places):
            result[row, s] = math.fsum(gamma**k * float(rewards[row, later]) for k, later in enumerate(places[t:]))
    return result


def remax(rewards: Floats, baseline: Floats, mask: Bools) -> Floats:
    """Return advantages. arXiv:2310.10505: the reward still to come minus that of the greedy rollout."""
    return np.where(mask, rewards_to_go(rewards, mask, 1.0) - baseline[:, None], 0.0)


def reinforce_plus_plus_baseline(rewards: Floats, groups: Ints, mask: Bools) -> Floats:
    """Return advantages. arXiv:2501.03262."""
    values = []
    for row in range(len(groups)):
        group = members(rewards, groups, row)
        values.append(0.0 if len(set(group)) == 1 else float(rewards[row]) - math.fsum(group) / len(group))
    return whiten(on_tokens(values, mask), mask)


def opo(rewards: Floats, groups: Ints, mask: Bools) -> Floats:
    """Return advantages. arXiv:2505.23585: the baseline weighs each response by its length."""
    values = []
    for row in range(len(groups)):
        rows = [i for i in range(len(groups)) if groups[i] == groups[row]]
        lengths = [int(mask[i].sum()) for i in rows]
        weighted = math.fsum(n * float(rewards[i]) for n, i in zip(lengths, rows, strict=True))
        values.append(float(rewards[row]) - weighted / sum(lengths) if sum(lengths) else 0.0)
    return on_tokens(values, mask)


def gpg(rewards: Floats, groups: Ints, mask: Bools) -> Floats:
    """Return advantages. arXiv:2504.02546: alpha = B / (B - M), M rollouts being in groups of equal rewards."""
    equal = sum(len(set(members(rewards, groups, row))) == 1 for row in range(len(groups)))
    if equal == len(groups):
        return np.zeros(mask.shape)
    alpha, values = len(groups) / (len(groups) - equal), []
    for row in range(len(groups)):
        group = members(rewards, groups, row)
        is_equal = len(set(group)) == 1
        values.append(0.0 if is_equal else alpha * (float(rewards[row]) - math.fsum(group) / len(group)))
    return on_tokens(values, mask)


def grpo_passk(rewards: Floats, groups: Ints, mask: Bools, norm_by_std: bool, epsilon: float) -> Floats:
    """Return advantages. arXiv:2503.19595: the best of a group gets its lead over the second."""
    values = []
    for row in range(len(groups)):
        group = sorted(members(rewards, groups, row), reverse=True)
        lead = group[0] - group[1] if len(group) > 1 and float(rewards[row]) == group[0] else 0.0
        if norm_by_std and lead:
            lead /= float(np.std(group, ddof=1)) + epsilon
        values.append(lead)
    return on_tokens(values, mask)


def gdpo(
    components: Floats, groups: Ints, mask: Bools, weights: list[float], norm_by_std: bool, epsilon: float
) -> Floats:
    """Return advantages. arXiv:2601.05242: GRPO of each component, their weighted sum, normalised over all rollouts."""
    sums = []
    for row in range(len(groups)):
        terms = []
        for k, weight in enumerate(weights):
            group = members(components[:, k], groups, row)
            if len(set(group)) > 1:
                centred = float(components[row, k]) - math.fsum(group) / len(group)
                spread = float(np.std(group, ddof=1)) + epsilon if norm_by_std else 1.0
                terms.append(weight * centred / spread)
        sums.append(math.fsum(terms))
    mean = math.fsum(sums) / len(sums)
    std = math.sqrt(math.fsum((s - mean) ** 2 for s in sums) / (len(sums) - 1)) if len(sums) > 1 else 0.0
    return on_tokens([(s - mean) / (std + epsilon) for s in sums], mask)


def penalize(scores: Floats, kl: Floats, mask: Bools, coef: float) -> Floats:
    """Return rewards a token. arXiv:1909.08593, equation 2, a token at a time."""
    result = np.zeros(mask.shape)
    for row in range(len(mask)):
        places = np.flatnonzero(mask[row])
        for s in places:
            result[row, s] = -coef * kl[row, s]
        if len(places):
            result[row, places[-1]] += scores[row]
    return result
