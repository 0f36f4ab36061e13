"""Estimators of KL(actor || reference), one value a token, from the log-probs of tokens that the actor sampled.

With x sampled by the actor and log-ratio d = log actor(x) - log reference(x). Inputs share one shape, [B, S] or [T].
J. Schulman, http://joschu.net/blog/kl-approx.html, names them k1, k2, k3.

Each is an estimate of the KL's value, as a penalty in the reward needs. As a loss, what counts is its gradient: on
policy that of ``k1`` has mean zero (it holds nothing back), that of ``mse`` is the exact gradient of KL(actor ||
reference) in expectation, and that of ``low_var_kl`` is the one of KL(reference || actor). ``kl`` is the value of
``k1`` with the gradient of ``mse``: the KL itself.

Shape suffixes: B rollouts, S sequence, T packed tokens.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from megarl.algorithm.registry import Registry
from megarl.catalog import KL_LOSSES

_MAX_LOG_RATIO = 20.0
_MAX_LOW_VAR_KL = 10.0


class KLEstimator(Protocol):
    """The signature of every KL estimator."""

    def __call__(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor: ...


kl_estimators: Registry[KLEstimator] = Registry("actor_rollout_ref.actor.kl_loss_type")


@kl_estimators.register("k1")
def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return k1 = d: unbiased, of high variance, negative on many tokens."""
    return logprobs - ref_logprobs


@kl_estimators.register("abs")
def absolute(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return |d|: an upper bound of the KL in expectation, never negative."""
    return (logprobs - ref_logprobs).abs()


@kl_estimators.register("mse")
@kl_estimators.register("k2")
def mse(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return k2 = d^2 / 2: biased, though little where the policies are close; of low variance, never negative."""
    return 0.5 * (logprobs - ref_logprobs).square()


@kl_estimators.register("low_var_kl")
@kl_estimators.register("k3")
def low_var_kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return k3 = exp(-d) - 1 + d: unbiased, of low variance, never negative.

    exp(-d) explodes on a token that the actor all but ruled out. As is usual in the field, d is clamped to +-20
    before the exponential, so that nothing overflows, and the value to 10 after it, so that one token can't own the
    loss. Where a clamp binds (d below about -2.6, or above about 11) the gradient is zero.
    """
    negative = (ref_logprobs - logprobs).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    # expm1 keeps the digits that exp(x) - 1 loses where the policies nearly agree, which is almost everywhere.
    return (torch.expm1(negative) - negative).clamp(max=_MAX_LOW_VAR_KL)


def _straight_through(value: KLEstimator) -> KLEstimator:
    """Return the estimator with the value of ``value`` and the gradient of ``mse``: d."""

    def estimate(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        carrier = mse(logprobs, ref_logprobs)
        return value(logprobs, ref_logprobs).detach() + (carrier - carrier.detach())

    return estimate


kl_estimators.register("kl")(_straight_through(k1))
for _name in KL_LOSSES:
    if _name.endswith("+"):
        kl_estimators.register(_name)(_straight_through(kl_estimators.get(_name.removesuffix("+"))))
