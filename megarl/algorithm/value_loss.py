"""The critic's loss, one value a token, and how well its values foresee the returns.

Shape suffixes: B rollouts, S sequence, N predicted tokens that count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megarl.algorithm.policy_loss import TokenLoss


def clipped_value_loss(
    values_N: Tensor, old_values_N: Tensor, returns_N: Tensor, clip_range: float | None = None
) -> TokenLoss:
    """Return max((V - R)^2, (clip(V, old - clip_range, old + clip_range) - R)^2) / 2, of each token.

    Only ``values_N`` carries a gradient. It is gone where the clip binds: V has left the range, and is nearer to R
    than the range allows. None clips nothing. As in the code that came with PPO, arXiv:1707.06347;
    arXiv:2006.05990 measures what it does.
    """
    unclipped_N = (values_N - returns_N).square()
    if clip_range is None:
        return TokenLoss(0.5 * unclipped_N, torch.zeros_like(unclipped_N))
    bounded_N = torch.minimum(torch.maximum(values_N, old_values_N - clip_range), old_values_N + clip_range)
    clipped_N = (bounded_N - returns_N).square()
    is_clipped_N = (clipped_N > unclipped_N).to(values_N.dtype)
    return TokenLoss(0.5 * torch.maximum(unclipped_N, clipped_N), is_clipped_N)


def explained_variance(values_BS: Tensor, returns_BS: Tensor, mask_BS: Tensor) -> float:
    """Return 1 - Var(R - V) / Var(R) over the masked tokens: 1 is perfect, 0 no better than a constant, below worse.

    0 where the returns don't vary, since there is nothing to explain.
    """
    values_N, returns_N = values_BS.detach().double()[mask_BS], returns_BS.detach().double()[mask_BS]
    if returns_N.numel() == 0 or bool((returns_N == returns_N[0]).all()):
        return 0.0
    return 1.0 - ((returns_N - values_N).var(correction=0) / returns_N.var(correction=0)).item()
