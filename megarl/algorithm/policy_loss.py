"""Policy losses, one value a token.

A loss sees the tokens of a micro-batch, end to end, always of whole sequences. What it says of a token depends on no
other sequence, so it is the same however rows are split into micro-batches and in whatever order they are packed. How
the values become one number is for ``megarl.algorithm.aggregate`` to say.

All share r_t = exp(logprob_t - old_logprob_t), whose log is clamped to +-20 so that one wild token can't overflow.

Shape suffixes: N predicted tokens that count, R sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megarl.algorithm.registry import Registry
from megarl.errors import AlgorithmError

# exp(20) is 5e8: beyond any ratio of a healthy run, far within float32, and its product with an advantage too.
_MAX_LOG_RATIO = 20.0


@dataclass(frozen=True)
class PolicyLossInputs:
    """The tokens of a micro-batch. Only ``logprobs_N`` carries a gradient.

    sequence_N: int64, which sequence the token is of, below ``num_sequences``; not every number need occur.
    rollout_weights_N: importance weights that multiply the loss, see ``megarl.algorithm.rollout_correction``.
    selected_N: bool, tokens chosen among all of a step, see ``megarl.algorithm.covariance``.
    """

    logprobs_N: Tensor
    old_logprobs_N: Tensor
    advantages_N: Tensor
    sequence_N: Tensor
    num_sequences: int
    rollout_weights_N: Tensor | None = None
    selected_N: Tensor | None = None


@dataclass(frozen=True)
class PolicyLossSettings:
    """Settings of all policy losses; each reads its own.

    clip_low, clip_high: how far the ratio may fall below and rise above 1 (geo_mean: its log below and above 0).
    clip_c: above 1, the ratio at which dual clip stops a token with a negative advantage; None never does (ppo_clip).
    tau_positive, tau_negative: steepness of the gate by the sign of the advantage (sapo). cov_share: share of a step's
    tokens to choose by covariance; cov_low, cov_high: between which it must lie (clip_cov); cov_kl_coef: weight of
    their KL (kl_cov).
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    clip_c: float | None = 3.0
    tau_positive: float = 1.0
    tau_negative: float = 1.05
    cov_share: float = 2e-4
    cov_low: float = 1.0
    cov_high: float = 5.0
    cov_kl_coef: float = 1.0


class TokenLoss(NamedTuple):
    """loss_N: to minimise. clipped_N: 1 where a clip changed the gradient, else 0; its mean is the clip fraction."""

    loss_N: Tensor
    clipped_N: Tensor


class PolicyLoss(Protocol):
    """The signature of every policy loss."""

    def __call__(self, inputs: PolicyLossInputs, settings: PolicyLossSettings) -> TokenLoss: ...


policy_losses: Registry[PolicyLoss] = Registry("actor_rollout_ref.actor.policy_loss")


def token_loss(name: str, inputs: PolicyLossInputs, settings: PolicyLossSettings) -> TokenLoss:
    """Return the policy loss called ``name`` of the tokens.

    Raises ConfigError for an unknown name, and AlgorithmError for what isn't one value a token with a gradient: a mean,
    say, would be broadcast and pass unseen.
    """
    loss = policy_losses.get(name)(inputs, settings)
    if not isinstance(loss, TokenLoss):
        raise AlgorithmError(f"policy loss {name} must return a TokenLoss, not a {type(loss).__name__}")
    for field, value in zip(loss._fields, loss, strict=True):
        if value.shape != inputs.logprobs_N.shape:
            shapes = f"{tuple(value.shape)}, must be {tuple(inputs.logprobs_N.shape)}"
            raise AlgorithmError(f"policy loss {name} gave a {field} of shape {shapes}: one value a token")
    if inputs.logprobs_N.requires_grad and not loss.loss_N.requires_grad:
        raise AlgorithmError(f"policy loss {name} has no gradient: its loss_N must follow from logprobs_N")
    return loss


@policy_losses.register("ppo_clip")
def ppo_clip(inputs: PolicyLossInputs, settings: PolicyLossSettings) -> TokenLoss:
    """Return the clipped surrogate -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), at most -clip_c A where A < 0.

    The last bound is dual clip: a token that got worse and much likelier can't own the loss. PPO, arXiv:1707.06347,
    equation 7; separate bounds as in DAPO, arXiv:2503.14476; dual clip, arXiv:1912.09729.
    """
    loss_N, is_clipped_N = _clipped_surrogate(_ratio(inputs), inputs.advantages_N, settings)
    if settings.clip_c is not None:
        bound_N = -settings.clip_c * inputs.advantages_N
        is_bound_N = (inputs.advantages_N < 0) & (loss_N > bound_N)
        loss_N, is_clipped_N = torch.where(is_bound_N, bound_N, loss_N), is_clipped_N | is_bound_N
    return _weighted(loss_N, is_clipped_N, inputs)


@policy_losses.register("gspo")
def gspo(inputs: PolicyLossInputs, settings: PolicyLossSettings) -> TokenLoss:
    """Return the clipped surrogate of the sequence's ratio s = exp(mean_t log r_t), of the same value on its tokens.

    A token carries sg[s] * exp(logprob_t - sg[logprob_t]), sg stopping the gradient: the value is s, the gradient
    s * A * grad logprob_t, so that with seq-mean-token-mean the sum is the gradient of -s A. Ratios are far nearer to
    1 than those of tokens, and so must the clip be: the paper has 3e-4 and 4e-4. GSPO, arXiv:2507.18071, section 4.3
    (GSPO-token).
    """
    log_ratio_N = inputs.logprobs_N - inputs.old_logprobs_N
    mean_N = _clamped(_sequence_mean(log_ratio_N, inputs).detach())
    ratio_N = mean_N.exp() * torch.exp(inputs.logprobs_N - inputs.logprobs_N.detach())
    return _weighted(*_clipped_surrogate(ratio_N, inputs.advantages_N, settings), inputs)


@policy_losses.register("geo_mean")
def geo_mean(inputs: PolicyLossInputs, settings: PolicyLossSettings) -> TokenLoss:
    """Return -A exp(mean_t c_t) on every token of a sequence, the geometric mean of its clipped ratios.

    c_t = log r_t clipped to at most clip_high where A > 0 and at least -clip_low where A < 0, else free; so the clip
    is of the log-ratio, 0.4 on both sides in the paper. With seq-mean-token-mean the sum is -A exp(mean c), the
    paper's. GMPO, arXiv:2507.20673.
    """
    log_ratio_N, sign_N = inputs.logprobs_N - inputs.old_logprobs_N, inputs.advantages_N.sign()
    bounded_N = log_ratio_N.clamp(-settings.clip_low, settings.clip_high)
    is_clipped_N = sign_N * bounded_N < sign_N * log_ratio_N
    ratio_N = _clamped(_sequence_mean(torch.where(is_clipped_N, bounded_N, log_ratio_N), inputs)).exp()
    return _weighted(-inputs.advantages_N * ratio_N, is_clipped_N, inputs)


@policy_losses.register("cispo")
def cispo(inputs: PolicyLossInputs, settings: PolicyLossSettings) -> TokenLoss:
    """Return -sg[clip(r, 1 - clip_low, 1 + clip_high)] A logprob: the clip bounds a weight, and takes no gradient away.

    The paper clips above alone (clip_low = 1 does that). MiniMax-M1, arXiv:2506.13585.
    """
    ratio_N = _ratio(inputs).detach()
    bounded_N = ratio_N.clamp(1.0 - settings.clip_low, 1.0 + settings.clip_high)
    return _weighted(-bounded_N * inputs.advantages_N * inputs.logprobs_N, bounded_N != ratio_N, inputs)


@policy_losses.register("sapo")
def sapo(inputs: PolicyLossInputs, settings: PolicyLossSettings) -> TokenLoss:
    """Return -A * 4 / tau * sigmoid(tau (r - 1)), tau = tau_positive where A > 0, else tau_negative.

    A soft gate in place of the clip: the gradient is that of -r A where r = 1, and fades smoothly on both sides,
    faster for a larger tau. SAPO, arXiv:2511.20347.
    """
    positive_N, ratio_N = inputs.advantages_N > 0, _ratio(inputs)
    tau_N = torch.full_like(ratio_N, settings.tau_negative).masked_fill(positive_N, settings.tau_positive)
    gate_N = 4.0 / tau_N * torch.sigmoid(tau_N * (ratio_N - 1.0))
    return _weighted(-inputs.advantages_N * gate_N, torch.zeros_like(positive_N), inputs)


@policy_losses.register("gpg")
def gpg(inputs: PolicyLossInputs, settings: PolicyLossSettings) -> TokenLoss:
    """Return -A logprob, the plain policy gradient: no ratio and no clip, so take one optimizer step a batch.

    GPG, arXiv:2504.02546; REINFORCE, Williams 1992.
    """
    return _weighted(
        -inputs.advantages_N * inputs.logprobs_N, torch.zeros_like(inputs.advantages_N, dtype=torch.bool), inputs
    )


@policy_losses.register("clip_cov")
def clip_cov(inputs: PolicyLossInputs, settings: PolicyLossSettings) -> TokenLoss:
    """Return the clipped surrogate, and zero on the selected tokens: those whose update costs the most entropy.

    The entropy mechanism, arXiv:2505.22617, section 4.2 (Clip-Cov). ``megarl.algorithm.covariance`` selects.
    """
    assert inputs.selected_N is not None, "clip_cov needs the tokens that megarl.algorithm.covariance selects"
    loss_N, is_clipped_N = _clipped_surrogate(_ratio(inputs), inputs.advantages_N, settings)
    loss_N = torch.where(inputs.selected_N, torch.zeros_like(loss_N), loss_N)
    return _weighted(loss_N, is_clipped_N | inputs.selected_N, inputs)


@policy_losses.register("kl_cov")
def kl_cov(inputs: PolicyLossInputs, settings: PolicyLossSettings) -> TokenLoss:
    """Return -r A, plus cov_kl_coef * |log r| on the selected tokens: they are held near the old policy.

    Nothing is clipped; ``clipped_N`` marks the selected tokens. |log r| is what the authors' code takes for the KL of
    the paper; on policy it has no gradient. The entropy mechanism, arXiv:2505.22617, section 4.2 (KL-Cov).
    ``megarl.algorithm.covariance`` selects.
    """
    assert inputs.selected_N is not None, "kl_cov needs the tokens that megarl.algorithm.covariance selects"
    penalty_N = settings.cov_kl_coef * _log_ratio(inputs).abs()
    loss_N = -inputs.advantages_N * _ratio(inputs)
    return _weighted(torch.where(inputs.selected_N, loss_N + penalty_N, loss_N), inputs.selected_N, inputs)


def _log_ratio(inputs: PolicyLossInputs) -> Tensor:
    return _clamped(inputs.logprobs_N - inputs.old_logprobs_N)


def _clamped(log_ratio_N: Tensor) -> Tensor:
    """Return log-ratios within bounds, so that no exponential overflows."""
    return log_ratio_N.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)


def _ratio(inputs: PolicyLossInputs) -> Tensor:
    return torch.exp(_log_ratio(inputs))


def _clipped_surrogate(ratio_N: Tensor, advantages_N: Tensor, settings: PolicyLossSettings) -> tuple[Tensor, Tensor]:
    """Return -min(r A, clip(r) A), and whether the clip took the gradient away."""
    unclipped_N = -advantages_N * ratio_N
    clipped_N = -advantages_N * ratio_N.clamp(1.0 - settings.clip_low, 1.0 + settings.clip_high)
    return torch.maximum(unclipped_N, clipped_N), clipped_N > unclipped_N


def _sequence_mean(values_N: Tensor, inputs: PolicyLossInputs) -> Tensor:
    """Return for each token the mean over the tokens of its sequence.

    The sum is float64, so that neither the order of its terms nor their number shows in a float32 result.
    """
    sums_R = torch.zeros(inputs.num_sequences, dtype=torch.float64, device=values_N.device)
    counts_R = sums_R.index_add(0, inputs.sequence_N, torch.ones_like(values_N, dtype=torch.float64))
    means_R = sums_R.index_add(0, inputs.sequence_N, values_N.double()) / counts_R.clamp(min=1)
    return means_R[inputs.sequence_N].to(values_N.dtype)


def _weighted(loss_N: Tensor, is_clipped_N: Tensor, inputs: PolicyLossInputs) -> TokenLoss:
    weights_N = inputs.rollout_weights_N
    return TokenLoss(loss_N if weights_N is None else loss_N * weights_N, is_clipped_N.to(loss_N.dtype))
