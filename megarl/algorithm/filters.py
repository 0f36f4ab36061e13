"""What DAPO does to rollouts before their advantages: leave out groups that teach nothing, fine overlong responses.

Shape suffixes: B rollouts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megarl.algorithm.group import groups_of


def in_group_with_spread(rewards_B: Tensor, group_B: Tensor) -> Tensor:
    """Return for each rollout whether its group has two different rewards; bool [B].

    A group of equal rewards (all right, all wrong, or of one rollout) has advantages of zero under every estimator
    that compares within the group; dynamic sampling replaces it. A NaN counts as different, so that it can't go
    unseen. DAPO, arXiv:2503.14476, section 3.2 and equation 11.
    """
    return groups_of(group_B).has_spread(rewards_B)


def overlong_penalty(num_tokens_B: Tensor, max_tokens: int, buffer_tokens: int, factor: float = 1.0) -> Tensor:
    """Return the penalty to add to the reward of each response, from -``factor`` to 0; float32 [B].

    With l response tokens, L = max_tokens and c = buffer_tokens: 0 where l <= L - c; factor * (L - c - l) / c where
    L - c < l <= L; -factor beyond. DAPO, arXiv:2503.14476, equation 13, soft overlong punishment.
    """
    assert 0 < buffer_tokens <= max_tokens, f"a buffer of {buffer_tokens} of {max_tokens} tokens"
    excess_B = (num_tokens_B.double() - (max_tokens - buffer_tokens)).clamp(0, buffer_tokens)
    return (-factor * excess_B / buffer_tokens).to(torch.float32)
