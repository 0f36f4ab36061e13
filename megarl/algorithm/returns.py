"""From the rewards of tokens to returns and generalised advantages, along the masked tokens of each rollout.

The next token is always the next *masked* one: a hole in the mask (the answer of a tool) is stepped over, and neither
values nor rewards outside the mask are read.

Shape suffixes: B rollouts, S sequence, T masked tokens of a rollout, moved together on the left.
"""

from __future__ import annotations

import torch
from torch import Tensor

_VARIANCE_FLOOR = 1e-8


def rewards_to_go(rewards_BS: Tensor, mask_BS: Tensor, discount: float) -> Tensor:
    """Return G_t = sum_{k >= t} discount^(k - t) r_k over masked tokens, zero outside the mask; float64 [B, S]."""
    sums_BT = _discounted_sums(_left_aligned(rewards_BS, mask_BS), discount)
    return _spread(sums_BT, mask_BS)


def generalized_advantages(
    rewards_BS: Tensor, values_BS: Tensor, mask_BS: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns, float64 [B, S], zero outside the mask.

    delta_t = r_t + gamma V_{t+1} - V_t with V = 0 after the last token; A_t = sum_{k >= t} (gamma lam)^(k - t)
    delta_k; return_t = A_t + V_t. GAE, arXiv:1506.02438, equation 16.
    """
    rewards_BT, values_BT = _left_aligned(rewards_BS, mask_BS), _left_aligned(values_BS, mask_BS)
    next_values_BT = torch.nn.functional.pad(values_BT[:, 1:], (0, 1))
    advantages_BT = _discounted_sums(rewards_BT + gamma * next_values_BT - values_BT, gamma * lam)
    return _spread(advantages_BT, mask_BS), _spread(advantages_BT + values_BT, mask_BS)


def whitened(values_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """Return (x - mean) / sqrt(variance + 1e-8) over all masked tokens together, zero outside the mask; float64.

    The variance is unbiased (divides by n - 1). Equal values give exactly zero, and so does a single one.
    """
    values_N = values_BS.double()[mask_BS]
    result_BS = torch.zeros(mask_BS.shape, dtype=torch.float64, device=mask_BS.device)
    if values_N.numel():
        shifted_N = values_N - values_N.min()
        deviation_N = shifted_N - shifted_N.mean()
        variance = deviation_N.square().sum() / max(values_N.numel() - 1, 1)
        result_BS[mask_BS] = deviation_N / (variance + _VARIANCE_FLOOR).sqrt()
    return result_BS


def _discounted_sums(values_BT: Tensor, discount: float) -> Tensor:
    """Return sum_{k >= t} discount^(k - t) x_k for every t.

    Each pass doubles how far ahead a token has looked, so that a sequence of 32k tokens takes 15 passes.
    """
    sums_BT, ahead = values_BT, 1
    while ahead < sums_BT.shape[1]:
        further_BT = torch.nn.functional.pad(sums_BT[:, ahead:], (0, ahead))
        sums_BT, ahead = sums_BT + discount**ahead * further_BT, 2 * ahead
    return sums_BT


def _left_aligned(values_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """Move the masked values of each row together on the left, in order, zeros after them; float64 [B, T]."""
    left_BT = _left_mask(mask_BS)
    result_BT = torch.zeros(left_BT.shape, dtype=torch.float64, device=values_BS.device)
    result_BT[left_BT] = values_BS.double()[mask_BS]
    return result_BT


def _spread(values_BT: Tensor, mask_BS: Tensor) -> Tensor:
    """Undo ``_left_aligned``: put values back where the mask is, zeros elsewhere; [B, S]."""
    result_BS = torch.zeros(mask_BS.shape, dtype=values_BT.dtype, device=values_BT.device)
    result_BS[mask_BS] = values_BT[_left_mask(mask_BS)]
    return result_BS


def _left_mask(mask_BS: Tensor) -> Tensor:
    num_tokens_B = mask_BS.sum(-1)
    longest = int(num_tokens_B.max()) if len(num_tokens_B) else 0
    return torch.arange(longest, device=mask_BS.device) < num_tokens_B.unsqueeze(1)
