"""Correct for the engine having sampled from another distribution than the one the trainer computes.

Kernels, precision and stale weights make the engine's log-probs differ from the trainer's. With log-ratio
d_t = logprob_t (trainer) - rollout_logprob_t (engine), a rollout can be weighted by the ratio, or rejected.

- Weights: exp(d_t) of each token, which ignores that earlier tokens led to it (biased, of low variance), or exp(sum d)
  of the sequence (unbiased, of high variance). Truncated importance sampling caps them. arXiv:1606.02647 and
  https://fengyao.notion.site/off-policy-rl
- A band: weights outside it become 0, but their tokens still count in the mean of the loss. IcePop, arXiv:2510.18855.
- Rejection: tokens or sequences leave the mask, and so the mean. By the ratio of the whole sequence (sequence_mis) or
  its geometric mean (geometric, seq_mask_tis) it is masked importance sampling. https://richardli.xyz/rl-collapse
- The off-policy mask: sequences that were worse than expected and have become unlikely teach nothing more.
  DeepSeek-V3.2, arXiv:2512.02556, section 3.1.

The first three compare the policy before its update, once for a whole step (``correct_rollouts``). Where that policy's
log-probs aren't computed (a bypass), and for the off-policy mask, each optimizer step compares the policy at hand
(``update_factors``). Either way the result depends on no split into micro-batches.

Shape suffixes: B rollouts, S sequence, N masked tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megarl.algorithm.group import Groups, groups_of
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
    off_policy_delta: of the off-policy mask, in nats a token; None masks nothing.
    """

    level: str | None = None
    cap: float = math.inf
    band: tuple[float, float] = (0.0, math.inf)
    normalize: bool = False
    rejections: tuple[Rejection, ...] = ()
    off_policy_delta: float | None = None


@dataclass(frozen=True)
class Correction:
    """weights_BS: to multiply the policy loss by, zero outside ``mask_BS``; None: by nothing. mask_BS: what is left."""

    weights_BS: Tensor | None
    mask_BS: Tensor
    metrics: Mapping[str, float]


class Criterion(Protocol):
    """The signature of every criterion: log-ratios [N], and the sequences that they are of, to a value [N]."""

    def __call__(self, log_ratio_N: Tensor, sequences: Groups) -> Tensor: ...


criteria: Registry[Criterion] = Registry("algorithm.rollout_correction.rejections")
presets: Registry[CorrectionSettings] = Registry("algorithm.rollout_correction.preset")


@criteria.register("token")
def token_ratio(log_ratio_N: Tensor, sequences: Groups) -> Tensor:
    """Return exp(d_t) of each token."""
    return log_ratio_N.exp()


@criteria.register("sequence")
def sequence_ratio(log_ratio_N: Tensor, sequences: Groups) -> Tensor:
    """Return exp(sum_t d_t) of each sequence: strict with long ones, whose ratios spread."""
    return sequences.sum(log_ratio_N).exp()


@criteria.register("geometric")
def geometric_ratio(log_ratio_N: Tensor, sequences: Groups) -> Tensor:
    """Return exp(mean_t d_t) of each sequence, the geometric mean of its ratios: fair to any length."""
    return _token_mean(log_ratio_N, sequences).exp()


@criteria.register("sequence_k3")
def sequence_k3(log_ratio_N: Tensor, sequences: Groups) -> Tensor:
    """Return mean_t (exp(d_t) - 1 - d_t) of each sequence, the k3 estimate of KL(engine || trainer) a token.

    Unlike the geometric mean, deviations up and down don't cancel.
    """
    return _token_mean(_k3(log_ratio_N), sequences)


@criteria.register("worst_token")
def worst_token_ratio(log_ratio_N: Tensor, sequences: Groups) -> Tensor:
    """Return exp(min_t d_t) of each sequence: one token that the trainer all but rules out vetoes its sequence."""
    return sequences.least(log_ratio_N).exp()


_GEOMETRIC = (Rejection("geometric", 0.999, 1.001),)
_K3 = (Rejection("sequence_k3", high=0.01),)
for _name, _preset in {
    "metrics_only": CorrectionSettings(),
    "token_tis": CorrectionSettings("token", cap=2.0),
    "sequence_tis": CorrectionSettings("sequence", cap=2.0),
    "sequence_mis": CorrectionSettings("sequence", cap=2.0, rejections=(Rejection("sequence", 0.5, 2.0),)),
    "seq_mask_tis": CorrectionSettings("token", rejections=(Rejection("geometric", 0.999, 1.002),)),
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
    """Return weights, what is left of the mask, and metrics of a step. The off-policy mask is no part of it.

    Ratios are clamped to exp(+-20) in weights, not in criteria. A NaN is never within a bound: its token is rejected
    by every criterion that sees it, and else its weight is NaN. Raises ConfigError for an unknown criterion.
    """
    log_ratio_N = old_logprobs_BS[mask_BS].double() - rollout_logprobs_BS[mask_BS].double()
    sequences = groups_of(mask_BS.nonzero()[:, 0])
    is_left_N = _accepted(log_ratio_N, sequences, settings)
    left_BS = mask_BS.clone()
    left_BS[mask_BS] = is_left_N
    metrics = _mismatch(log_ratio_N) | _share_masked(mask_BS, left_BS)
    if settings.level is None:
        return Correction(None, left_BS, metrics)
    raw_N = _raw_weights(log_ratio_N, sequences, settings.level)
    weights_N = torch.where(is_left_N, _bounded(raw_N, settings), 0.0)
    if settings.normalize:
        weights_N = weights_N / _mean_weight(weights_N, is_left_N, sequences, settings.level)
    weights_BS = torch.zeros_like(old_logprobs_BS)
    weights_BS[mask_BS] = weights_N.to(weights_BS.dtype)
    metrics |= {
        "weight_mean": _mean_of(weights_N[is_left_N]),
        "weight_ess": _effective_share(weights_N[is_left_N]),
        "share_truncated": _mean_of((raw_N > settings.cap)[is_left_N]),
        "share_outside_band": _mean_of(_is_banned(raw_N, settings)[is_left_N]),
    }
    return Correction(weights_BS, left_BS, metrics)


def update_factors(
    log_ratio_N: Tensor, advantages_N: Tensor, sequence_N: Tensor, settings: CorrectionSettings
) -> Tensor:
    """Return the factors [N] of the tokens' policy losses in an optimizer step, in the dtype of the log-ratios.

    log_ratio_N: of the policy at hand to the engine. sequence_N: int64, which sequence a token is of, all of whose
    tokens must be there. The factor is the weight, and 0 where a rejection or the off-policy mask leaves the token out:
    M_t = 0 where A_t < 0 and mean_t (-d_t), an estimate of KL(engine || policy) a token, is above off_policy_delta. A
    token that is left out still counts in the mean of the loss, as in DeepSeek-V3.2, arXiv:2512.02556, section 3.1:
    how many are in other micro-batches isn't known. ``normalize`` would need them too, and is not for here.
    """
    assert not settings.normalize, "the mean weight of a step isn't known in an update"
    d_N, sequences = log_ratio_N.double(), groups_of(sequence_N)
    is_left_N = _accepted(d_N, sequences, settings)
    if settings.off_policy_delta is not None:
        is_near_N = -_token_mean(d_N, sequences) <= settings.off_policy_delta
        is_left_N = is_left_N & (is_near_N | (advantages_N >= 0))
    factors_N = torch.ones_like(d_N)
    if settings.level is not None:
        factors_N = _bounded(_raw_weights(d_N, sequences, settings.level), settings)
    return torch.where(is_left_N, factors_N, 0.0).to(log_ratio_N.dtype)


def _accepted(log_ratio_N: Tensor, sequences: Groups, settings: CorrectionSettings) -> Tensor:
    accepted_N = torch.ones_like(log_ratio_N, dtype=torch.bool)
    for rejection in settings.rejections:
        value_N = criteria.get(rejection.criterion)(log_ratio_N, sequences)
        accepted_N = accepted_N & (value_N >= rejection.low) & (value_N <= rejection.high)
    return accepted_N


def _raw_weights(log_ratio_N: Tensor, sequences: Groups, level: str) -> Tensor:
    """Return exp(d), of each token or, on all of its tokens, of each sequence."""
    assert level in ("token", "sequence"), level
    return _safe_exp(sequences.sum(log_ratio_N) if level == "sequence" else log_ratio_N)


def _bounded(raw_N: Tensor, settings: CorrectionSettings) -> Tensor:
    return torch.where(_is_banned(raw_N, settings), 0.0, raw_N.clamp(max=settings.cap))


def _is_banned(raw_N: Tensor, settings: CorrectionSettings) -> Tensor:
    return (raw_N < settings.band[0]) | (raw_N > settings.band[1])


def _mean_weight(weights_N: Tensor, is_left_N: Tensor, sequences: Groups, level: str) -> Tensor:
    """Return the mean over tokens that are left or, as each has one weight, over sequences; 1 where all are zero."""
    share_N = is_left_N.double()
    if level == "sequence":
        share_N = share_N / sequences.sum(share_N).clamp(min=1)
    total = (weights_N * share_N).sum()
    return torch.where(total == 0, 1.0, total / share_N.sum())


def _token_mean(values_N: Tensor, sequences: Groups) -> Tensor:
    """Return the mean over the tokens of each sequence, on all of them."""
    return sequences.sum(values_N) / sequences.size_B


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
