"""Policy losses, one value a token. Inputs share one shape: padded [B, S] or packed [T].

Shape suffixes: B rollouts, S sequence, T packed tokens.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megarl.algorithm.registry import Registry

# exp(20) is 5e8: beyond any ratio of a healthy run, far within float32, and its product with an advantage too.
_MAX_LOG_RATIO = 20.0


class TokenLoss(NamedTuple):
    """loss: to minimise. clipped: 1 where the clip took the gradient away, else 0; its mean is the clip fraction."""

    loss: Tensor
    clipped: Tensor


class PolicyLoss(Protocol):
    """The signature of every policy loss. Only ``logprobs`` carries a gradient."""

    def __call__(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
    ) -> TokenLoss: ...


policy_losses: Registry[PolicyLoss] = Registry("actor_rollout_ref.actor.policy_loss")


@policy_losses.register("ppo_clip")
def ppo_clip(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> TokenLoss:
    """Return the clipped surrogate -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) with r = exp(logprob - old).

    The log-ratio is clamped to +-20 so that one wild token can't overflow. Tokens that are zero in all three inputs
    (padding, prompts) have loss zero. PPO, arXiv:1707.06347, equation 7; separate bounds as in DAPO,
    arXiv:2503.14476.
    """
    ratio = torch.exp((logprobs - old_logprobs).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO))
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return TokenLoss(torch.maximum(unclipped, clipped), (clipped > unclipped).to(ratio.dtype))
