"""Losses of megarl.algorithm.policy_loss again: float64 NumPy loops from the papers, sharing no code with it.

Each takes the columns of one sequence after another as lists of arrays, and returns a list of (loss, clipped).
"""

from __future__ import annotations

import math

import numpy as np

from tests.unit.numpy_reference import Floats

Sequence = tuple[Floats, Floats, Floats]  # new log-probs, old log-probs, advantages
Result = tuple[Floats, Floats]


def _surrogate(ratio: float, advantage: float, low: float, high: float) -> tuple[float, bool]:
    bounded = min(max(ratio, 1 - low), 1 + high)
    return -min(ratio * advantage, bounded * advantage), bounded * advantage < ratio * advantage


def _by_token(values: list[tuple[float, bool]]) -> Result:
    return np.array([v for v, _ in values]), np.array([float(c) for _, c in values])


def ppo_clip(sequence: Sequence, low: float, high: float, clip_c: float | None) -> Result:
    """arXiv:1707.06347, equation 7; arXiv:1912.09729 for clip_c: max(min(r A, clip(r) A), c A) where A < 0."""
    values = []
    for new, old, advantage in zip(*sequence, strict=True):
        loss, clipped = _surrogate(math.exp(new - old), advantage, low, high)
        if clip_c is not None and advantage < 0 and -loss < clip_c * advantage:
            loss, clipped = -clip_c * advantage, True
        values.append((loss, clipped))
    return _by_token(values)


def gspo(sequence: Sequence, low: float, high: float) -> Result:
    """arXiv:2507.18071: s = (pi_new(y) / pi_old(y))^(1 / |y|), clipped like a ratio."""
    new, old, advantages = sequence
    ratio = math.exp(math.fsum(new - old) / len(new)) if len(new) else 1.0
    return _by_token([_surrogate(ratio, a, low, high) for a in advantages])


def geo_mean(sequence: Sequence, low: float, high: float) -> Result:
    """arXiv:2507.20673: the geometric mean of ratios that are clipped to [e^-low, e^high] one by one."""
    logs, clipped = [], []
    for new, old, advantage in zip(*sequence, strict=True):
        ratio = math.exp(new - old)
        inside = ratio
        if advantage > 0:
            inside = min(ratio, math.exp(high))
        elif advantage < 0:
            inside = max(ratio, math.exp(-low))
        logs.append(math.log(inside))
        clipped.append(inside != ratio)
    mean = math.exp(math.fsum(logs) / len(logs)) if logs else 1.0
    return _by_token([(-float(a) * mean, c) for a, c in zip(sequence[2], clipped, strict=True)])


def cispo(sequence: Sequence, low: float, high: float) -> Result:
    """arXiv:2506.13585: REINFORCE, weighted by the clipped ratio."""
    values = []
    for new, old, advantage in zip(*sequence, strict=True):
        ratio = math.exp(new - old)
        weight = min(max(ratio, 1 - low), 1 + high)
        values.append((-weight * advantage * new, weight != ratio))
    return _by_token(values)


def sapo(sequence: Sequence, tau_positive: float, tau_negative: float) -> Result:
    """arXiv:2511.20347: f(r) = 4 / tau * sigmoid(tau (r - 1))."""
    values = []
    for new, old, advantage in zip(*sequence, strict=True):
        tau = tau_positive if advantage > 0 else tau_negative
        gate = 4 / tau / (1 + math.exp(-tau * (math.exp(new - old) - 1)))
        values.append((-gate * advantage, False))
    return _by_token(values)


def gpg(sequence: Sequence) -> Result:
    """arXiv:2504.02546: -A log pi."""
    return _by_token([(-a * new, False) for new, _, a in zip(*sequence, strict=True)])


def clip_cov(sequence: Sequence, selected: list[bool], low: float, high: float) -> Result:
    """arXiv:2505.22617: the surrogate, nothing where selected."""
    values = []
    for (new, old, advantage), out in zip(zip(*sequence, strict=True), selected, strict=True):
        loss, clipped = _surrogate(math.exp(new - old), advantage, low, high)
        values.append((0.0, True) if out else (loss, clipped))
    return _by_token(values)


def kl_cov(sequence: Sequence, selected: list[bool], coef: float) -> Result:
    """arXiv:2505.22617: no clip, a KL penalty where selected."""
    values = []
    for (new, old, advantage), penalised in zip(zip(*sequence, strict=True), selected, strict=True):
        loss = -math.exp(new - old) * advantage + (coef * abs(new - old) if penalised else 0.0)
        values.append((loss, penalised))
    return _by_token(values)


def covariance(logprobs: Floats, advantages: Floats) -> Floats:
    """arXiv:2505.22617, the centred cross-product of each token."""
    mean_logprob, mean_advantage = math.fsum(logprobs) / len(logprobs), math.fsum(advantages) / len(advantages)
    return np.array([(p - mean_logprob) * (a - mean_advantage) for p, a in zip(logprobs, advantages, strict=True)])


def value(new: Floats, old: Floats, returns: Floats, clip_range: float) -> Result:
    """Half the larger of the two squared errors, of the value and of the value kept in a range around the old one."""
    values = []
    for v, o, r in zip(new, old, returns, strict=True):
        free, kept = (v - r) ** 2, (min(max(v, o - clip_range), o + clip_range) - r) ** 2
        values.append((max(free, kept) / 2, kept > free))
    return _by_token(values)
