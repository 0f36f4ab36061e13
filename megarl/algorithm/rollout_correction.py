"""Correct for the engine having sampled from another distribution than the one the trainer computes.

Kernels, precision and stale weights make the engine's log-probs differ from the trainer's. With log-ratio
d_t = old_logprob_t (trainer) - rollout_logprob_t (engine), a rollout can be weighted by the ratio, or rejected. Both
act on the policy loss of a whole step and are computed once, before the update, so they depend on no split of it.

- Weights: exp(d_t) of each token, which ignores that earlier tokens led to it (biased, of low variance), or exp(sum d)
  of the sequence (unbiased, of high variance). Truncated importance sampling caps them. arXiv:1606.02647 and
  https://fengyao.notion.site/off-policy-rl
- A band: weights outside it become 0, but their tokens still count in the mean of the loss. IcePop, arXiv:2510.18855.
- Rejection: tokens or sequences leave the mask, and so the mean. https://richardli.xyz/rl-collapse

Shape suffixes: B rollouts, S sequence, N masked tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megarl.algorithm.registry import Registry

_MAX_LOG_RATIO = 20.0
_QUANTILES = {"min": 0.0, "q01": 0.01, "q50": 0.5, "q99": 0.99, "max": 1.0}


@dataclass(frozen=True)
class Rejection:
    """Leave out what a criterion puts below ``low`` or above ``high``."""

    criterion: str
    low: float = 0.0
    high: float = math.inf


@dataclass(frozen=True)
class CorrectionSettings:
    """What to correct, and how far.

    level: ``token`` or ``sequence`` weights; None weighs nothing. cap: the largest weight. band: the weights that
    are kept, others become 0. normalize: divide weights by their mean over the step. rejections: all apply.
    """

    level: str | None = None
    cap: float = math.inf
    band: tuple[float, float] = (0.0, math.inf)
    normalize: bool = False
    rejections: tuple[Rejection, ...] = ()


@dataclass(frozen=True)
class Correction:
    """weights_BS: to multiply the policy loss by, zero outside ``mask_BS``; None: by nothing. mask_BS: what is left."""

    weights_BS: Tensor | None
    mask_BS: Tensor
    metrics: Mapping[str, float]


class Criterion(Protocol):
    """The signature of every criterion: log-ratios, zero outside the mask, to [B, S] or, one a sequence, [B, 1]."""

    def __call__(self, log_ratio_BS: Tensor, mask_BS: Tensor) -> Tensor: ...


criteria: Registry[Criterion] = Registry("algorithm.rollout_correction.rejections")
presets: Registry[CorrectionSettings] = Registry("algorithm.rollout_correction.preset")


@criteria.register("token")
def token_ratio(log_ratio_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """Return exp(d_t) of each token."""
    return log_ratio_BS.exp()


@criteria.register("sequence")
def sequence_ratio(log_ratio_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """Return exp(sum_t d_t) of each sequence: strict with long ones, whose ratios spread."""
    return log_ratio_BS.sum(-1, keepdim=True).exp()


@criteria.register("geometric")
def geometric_ratio(log_ratio_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """Return exp(mean_t d_t) of each sequence, the geometric mean of its ratios: fair to any length."""
    return _token_mean(log_ratio_BS, mask_BS).exp()


@criteria.register("sequence_k3")
def sequence_k3(log_ratio_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """Return mean_t (exp(d_t) - 1 - d_t) of each sequence, the k3 estimate of KL(engine || trainer) a token.

    Unlike the geometric mean, deviations up and down don't cancel.
    """
    return _token_mean(_k3(log_ratio_BS), mask_BS)


@criteria.register("worst_token")
def worst_token_ratio(log_ratio_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """Return exp(min_t d_t) of each sequence: one token that the trainer all but rules out vetoes its sequence."""
    return torch.where(mask_BS, log_ratio_BS, math.inf).amin(-1, keepdim=True).exp()


_GEOMETRIC = (Rejection("geometric", 0.999, 1.001),)
_K3 = (Rejection("sequence_k3", high=0.01),)
for _name, _preset in {
    "metrics_only": CorrectionSettings(),
    "token_tis": CorrectionSettings("token", cap=2.0),
    "sequence_tis": CorrectionSettings("sequence", cap=2.0),
    "sequence_mis": CorrectionSettings("sequence", cap=2.0, rejections=(Rejection("sequence", 0.5, 2.0),)),
    "icepop": CorrectionSettings("token", band=(0.5, 5.0)),
    "geometric": CorrectionSettings(rejections=_GEOMETRIC),
    "geometric_token_tis": CorrectionSettings("token", cap=2.0, rejections=_GEOMETRIC),
    "geometric_sequence_tis": CorrectionSettings("sequence", cap=2.0, rejections=_GEOMETRIC),
    "k3": CorrectionSettings(rejections=_K3),
    "k3_token_tis": CorrectionSettings("token", cap=2.0, rejections=_K3),
    "k3_sequence_tis": CorrectionSettings("sequence", cap=2.0, rejections=_K3),
}.items():
    presets.register(_name)(_preset)


def correct_rollouts(
    old_logprobs_BS: Tensor, rollout_logprobs_BS: Tensor, mask_BS: Tensor, settings: CorrectionSettings
) -> Correction:
    """Return weights, what is left of the mask, and metrics of a step.

    Ratios are clamped to exp(+-20) in weights, not in criteria. A NaN is never within a bound: its token is rejected
    by every criterion that sees it, and else its weight is NaN. Raises ConfigError for an unknown criterion.
    """
    log_ratio_BS = torch.where(mask_BS, old_logprobs_BS.double() - rollout_logprobs_BS.double(), 0.0)
    left_BS = mask_BS & _accepted(log_ratio_BS, mask_BS, settings)
    metrics = _mismatch(log_ratio_BS[mask_BS]) | _share_masked(mask_BS, left_BS)
    if settings.level is None:
        return Correction(None, left_BS, metrics)
    raw_BS = _raw_weights(log_ratio_BS, settings.level)
    is_banned_BS = (raw_BS < settings.band[0]) | (raw_BS > settings.band[1])
    weights_BS = torch.where(is_banned_BS, 0.0, raw_BS.clamp(max=settings.cap))
    weights_BS = torch.where(left_BS, weights_BS, 0.0)
    if settings.normalize:
        weights_BS = weights_BS / _mean_weight(weights_BS, left_BS, settings.level)
    metrics |= {
        "weight_mean": _mean_of(weights_BS[left_BS]),
        "weight_ess": _effective_share(weights_BS[left_BS]),
        "share_truncated": _mean_of((raw_BS > settings.cap)[left_BS]),
        "share_outside_band": _mean_of(is_banned_BS[left_BS]),
    }
    return Correction(weights_BS.to(old_logprobs_BS.dtype), left_BS, metrics)


def _accepted(log_ratio_BS: Tensor, mask_BS: Tensor, settings: CorrectionSettings) -> Tensor:
    accepted_BS = torch.ones_like(mask_BS)
    for rejection in settings.rejections:
        value = criteria.get(rejection.criterion)(log_ratio_BS, mask_BS)
        accepted_BS = accepted_BS & (value >= rejection.low) & (value <= rejection.high)
    return accepted_BS


def _raw_weights(log_ratio_BS: Tensor, level: str) -> Tensor:
    """Return exp(d), of each token or, on all of its tokens, of each sequence."""
    assert level in ("token", "sequence"), level
    if level == "sequence":
        log_ratio_BS = log_ratio_BS.sum(-1, keepdim=True).expand_as(log_ratio_BS)
    return _safe_exp(log_ratio_BS)


def _mean_weight(weights_BS: Tensor, mask_BS: Tensor, level: str) -> Tensor:
    """Return the mean over masked tokens or, as each has one weight, over sequences; 1 where all weights are zero."""
    values = weights_BS[mask_BS]
    if level == "sequence":
        values = _token_mean(weights_BS, mask_BS)[mask_BS.any(-1)]
    mean = values.sum() / max(values.numel(), 1)
    return torch.where(mean == 0, 1.0, mean)


def _token_mean(values_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """Return the mean over the masked tokens of each row [B, 1], zero where there are none."""
    sums_B1 = torch.where(mask_BS, values_BS, 0.0).sum(-1, keepdim=True)
    return sums_B1 / mask_BS.sum(-1, keepdim=True).clamp(min=1)


def _safe_exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()


def _k3(log_ratio: Tensor) -> Tensor:
    return torch.expm1(log_ratio) - log_ratio


def _mismatch(log_ratio_N: Tensor) -> dict[str, float]:
    """Return the metrics of the distance between the two distributions, over all tokens, rejected ones included."""
    sorted_N = log_ratio_N.exp().sort().values
    last = len(sorted_N) - 1
    # Of the two neighbours of a quantile the lower; torch.quantile refuses as many tokens as a large step has.
    quantiles = {f"ratio_{n}": sorted_N[int(q * last)].item() if last >= 0 else 1.0 for n, q in _QUANTILES.items()}
    return quantiles | {
        "kl": _mean_of(-log_ratio_N),
        "kl_k3": _mean_of(_k3(log_ratio_N)),
        "ratio_ess": _effective_share(_safe_exp(log_ratio_N)),
    }


def _share_masked(mask_BS: Tensor, left_BS: Tensor) -> dict[str, float]:
    had_tokens_B = mask_BS.any(-1)
    return {
        "share_masked": _mean_of(~left_BS[mask_BS]),
        "share_sequences_masked": _mean_of(~left_BS.any(-1)[had_tokens_B]),
    }


def _effective_share(weights_N: Tensor) -> float:
    """Return the effective sample size over the size, (sum w)^2 / (N sum w^2): 1 where all weigh alike, 0 of none."""
    if not bool((weights_N != 0).any()):
        return 0.0
    return (weights_N.sum().square() / (weights_N.numel() * weights_N.square().sum())).item()


def _mean_of(values_N: Tensor) -> float:
    return values_N.double().mean().item() if values_N.numel() else 0.0
