"""From one score a rollout to one reward a token: the score on the last token, and a penalty for KL on every token.

Shape suffixes: B rollouts, S sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor


def on_last_token(scores_B: Tensor, mask_BS: Tensor) -> Tensor:
    """Return [B, S]: each score on the last masked token of its rollout, zero elsewhere.

    A rollout without masked tokens has no place for its score, and gets zeros.
    """
    position_S = torch.arange(1, mask_BS.shape[1] + 1, device=mask_BS.device)
    ordinal_BS = mask_BS * position_S
    is_last_BS = mask_BS & (ordinal_BS == ordinal_BS.amax(-1, keepdim=True))
    return torch.where(is_last_BS, scores_B.unsqueeze(1), torch.zeros_like(scores_B).unsqueeze(1))


def penalize_rewards(scores_B: Tensor, kl_BS: Tensor, mask_BS: Tensor, coef: float) -> Tensor:
    """Return r_t = score on the last masked token - coef * kl_t, zero outside the mask; [B, S] like ``kl_BS``.

    kl_BS: an estimate of KL(actor || reference) on each token, see ``megarl.algorithm.kl``; only masked ones are
    read. InstructGPT, arXiv:2203.02155, equation 2; Fine-tuning from human preferences, arXiv:1909.08593, equation 2.
    """
    penalties_BS = torch.where(mask_BS, coef * kl_BS, torch.zeros_like(kl_BS))
    return on_last_token(scores_B, mask_BS).to(kl_BS.dtype) - penalties_BS
