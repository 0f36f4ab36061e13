"""megarl.algorithm.rollout_correction again: float64 NumPy loops, sharing no code with it."""

from __future__ import annotations

import math

import numpy as np

from tests.unit.numpy_reference import Bools, Floats, Ints


def statistic(criterion: str, log_ratios: list[float], token: int) -> float:
    """Return what ``criterion`` says of one token of a sequence, from the log-ratios of its masked tokens."""
    k3 = [math.exp(d) - 1 - d for d in log_ratios]
    return {
        "token": math.exp(log_ratios[token]),
        "sequence": math.prod(math.exp(d) for d in log_ratios),
        "geometric": math.exp(math.fsum(log_ratios) / len(log_ratios)),
        "sequence_k3": math.fsum(k3) / len(k3),
        "worst_token": min(math.exp(d) for d in log_ratios),
    }[criterion]


def mask_after(old: Floats, rollout: Floats, mask: Bools, rejections: list[tuple[str, float, float]]) -> Bools:
    """Return the mask without what any (criterion, low, high) rejects."""
    left = mask.copy()
    for row in range(len(mask)):
        places = np.flatnonzero(mask[row])
        log_ratios = [float(old[row, s] - rollout[row, s]) for s in places]
        for t, s in enumerate(places):
            for criterion, low, high in rejections:
                if not low <= statistic(criterion, log_ratios, t) <= high:
                    left[row, s] = False
    return left


def weights(
    old: Floats,
    rollout: Floats,
    mask: Bools,
    left: Bools,
    level: str,
    cap: float,
    band: tuple[float, float],
    normalize: bool,
) -> Floats:
    """Return the weights; sums of a sequence run over all tokens that were sampled, rejected or not."""
    result, by_sequence = np.zeros(mask.shape), []
    for row in range(len(mask)):
        log_ratios = {s: float(old[row, s] - rollout[row, s]) for s in np.flatnonzero(mask[row])}
        for s in np.flatnonzero(left[row]):
            ratio = math.exp(log_ratios[s] if level == "token" else math.fsum(log_ratios.values()))
            result[row, s] = min(ratio, cap) if band[0] <= ratio <= band[1] else 0.0
        if left[row].any():
            by_sequence.append(float(result[row][left[row]][0]))
    sample = by_sequence if level == "sequence" else [float(w) for w in result[left]]
    if normalize and any(sample):
        result /= math.fsum(sample) / len(sample)
    return result


def factors(
    log_ratios: Floats,
    advantages: Floats,
    sequence: Ints,
    rejections: list[tuple[str, float, float]],
    level: str | None,
    cap: float,
    band: tuple[float, float],
    delta: float | None,
) -> Floats:
    """Return the factor of each token in an update. arXiv:2512.02556, section 3.1, for ``delta``."""
    result = np.zeros(len(log_ratios))
    for name in set(sequence.tolist()):
        places = [i for i in range(len(sequence)) if sequence[i] == name]
        ratios = [float(log_ratios[i]) for i in places]
        drift = math.fsum(-d for d in ratios) / len(ratios)
        for t, i in enumerate(places):
            is_kept = all(low <= statistic(name, ratios, t) <= high for name, low, high in rejections)
            if delta is not None and advantages[i] < 0 and drift > delta:
                is_kept = False
            weight = 1.0
            if level is not None:
                raw = math.exp(ratios[t] if level == "token" else math.fsum(ratios))
                weight = min(raw, cap) if band[0] <= raw <= band[1] else 0.0
            result[i] = weight if is_kept else 0.0
    return result


def effective_share(values: list[float]) -> float:
    """Return the effective sample size over the size: (sum w)^2 / (n sum w^2)."""
    return math.fsum(values) ** 2 / (len(values) * math.fsum(v * v for v in values))
