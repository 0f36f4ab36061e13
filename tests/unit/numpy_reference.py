"""The mathematics of megarl.algorithm again: float64 NumPy loops written from the papers, sharing no code with it."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


def grpo(rewards: Floats, groups: Ints, mask: Bools, norm_by_std: bool, epsilon: float) -> Floats:
    """Return advantages [B, S]. DeepSeekMath, arXiv:2402.03300, section 4.1.2."""
    advantages = np.zeros(mask.shape)
    for row, group in enumerate(groups):
        members = [float(r) for r, g in zip(rewards, groups, strict=True) if g == group]
        if len(set(members)) == 1:
            continue
        value = float(rewards[row]) - math.fsum(members) / len(members)
        if norm_by_std:
            value /= float(np.std(members, ddof=1)) + epsilon
        advantages[row][mask[row]] = value
    return advantages


def rloo(rewards: Floats, groups: Ints, mask: Bools) -> Floats:
    """Return advantages [B, S]. arXiv:2402.14740, section 2.2: the baseline is the mean of the other samples."""
    advantages = np.zeros(mask.shape)
    for row, group in enumerate(groups):
        others = [float(rewards[i]) for i in range(len(groups)) if groups[i] == group and i != row]
        if others:
            advantages[row][mask[row]] = float(rewards[row]) - math.fsum(others) / len(others)
    return advantages


def kl(name: str, actor: Floats, reference: Floats) -> Floats:
    """Return the estimator's value on each token. http://joschu.net/blog/kl-approx.html, with r = reference / actor."""
    result = np.zeros(actor.shape)
    for i in np.ndindex(actor.shape):
        log_r = reference[i] - actor[i]
        k1, k2, k3 = -log_r, log_r**2 / 2, (math.exp(log_r) - 1) - log_r
        values = {"kl": k1, "k1": k1, "abs": abs(log_r), "mse": k2, "k2": k2, "low_var_kl": k3, "k3": k3}
        result[i] = values[name.removesuffix("+")]
    return result


def aggregate(mode: str, losses: Floats, mask: Bools, max_tokens: int) -> float:
    """Return the loss of a whole mini-batch [B, S]; rollouts without tokens are no part of it."""
    rows = [row[keep] for row, keep in zip(losses, mask, strict=True) if keep.any()]
    if not rows:
        return 0.0
    if mode == "token-mean":
        return float(np.mean(np.concatenate(rows)))
    divisors = {
        "seq-mean-token-sum": [1] * len(rows),
        "seq-mean-token-mean": [len(row) for row in rows],
        "seq-mean-token-sum-norm": [max_tokens] * len(rows),
    }[mode]
    return math.fsum(math.fsum(row) / divisor for row, divisor in zip(rows, divisors, strict=True)) / len(rows)


def logprob_difference(train: Floats, rollout: Floats, mask: Bools) -> tuple[float, float, float]:
    """Return mean |train - rollout|, max |train - rollout| and mean (rollout - train)."""
    difference = [float(rollout[i] - train[i]) for i in np.ndindex(mask.shape) if mask[i]]
    sizes = [abs(d) for d in difference]
    return math.fsum(sizes) / len(sizes), max(sizes), math.fsum(difference) / len(difference)
