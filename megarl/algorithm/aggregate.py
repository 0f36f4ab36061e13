"""From a loss a token to the loss of a mini-batch: loss = sum over masked tokens of weight * loss of the token.

The weights are normalised by the whole mini-batch, over all data-parallel ranks and micro-batches. So the sum may be
taken over any split of the rows, in any order, padded or packed, and the parts simply add up: the gradient doesn't
depend on the layout. (Whoever averages gradients over ranks must undo it.)

Shape suffixes: B rollouts, S sequence.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from megarl.algorithm.registry import Registry


class Aggregation(Protocol):
    """The signature of every aggregation. It is only asked about rollouts in a mini-batch that has masked tokens.

    num_tokens_B: float64, at least 1. total_tokens, total_rollouts: of the whole mini-batch, at least 1. max_tokens:
    of the longest response that can be, the same in every mini-batch of a run; None where the caller knows none.
    """

    def __call__(
        self, num_tokens_B: Tensor, total_tokens: int, total_rollouts: int, max_tokens: int | None
    ) -> Tensor: ...


aggregations: Registry[Aggregation] = Registry("actor_rollout_ref.actor.loss_agg_mode")


@aggregations.register("token-mean")
def token_mean(num_tokens_B: Tensor, total_tokens: int, total_rollouts: int, max_tokens: int | None) -> Tensor:
    """Weigh every token alike: w = 1 / total_tokens. Long responses count for more. DAPO, arXiv:2503.14476."""
    return torch.full_like(num_tokens_B, 1.0 / total_tokens)


@aggregations.register("seq-mean-token-sum")
def seq_mean_token_sum(num_tokens_B: Tensor, total_tokens: int, total_rollouts: int, max_tokens: int | None) -> Tensor:
    """Average rollouts, each the sum of its tokens: w = 1 / total_rollouts.

    Long responses count for more. Dr. GRPO up to a constant factor, arXiv:2503.20783.
    """
    return torch.full_like(num_tokens_B, 1.0 / total_rollouts)


@aggregations.register("seq-mean-token-mean")
def seq_mean_token_mean(num_tokens_B: Tensor, total_tokens: int, total_rollouts: int, max_tokens: int | None) -> Tensor:
    """Average rollouts, each the mean of its tokens: w_b = 1 / (total_rollouts * num_tokens_b).

    Every response counts alike, so a token of a long one counts for less. GRPO, arXiv:2402.03300, equation 3.
    """
    return 1.0 / (total_rollouts * num_tokens_B)


@aggregations.register("seq-mean-token-sum-norm")
def seq_mean_token_sum_norm(
    num_tokens_B: Tensor, total_tokens: int, total_rollouts: int, max_tokens: int | None
) -> Tensor:
    """Average rollouts, each the sum of its tokens over a constant: w = 1 / (total_rollouts * max_tokens).

    The constant keeps the loss of the size of a mean over tokens, without favouring short responses. Dr. GRPO,
    arXiv:2503.20783, whose code divides by the generation budget.
    """
    assert max_tokens is not None, "seq-mean-token-sum-norm divides by max_tokens"
    return torch.full_like(num_tokens_B, 1.0 / (total_rollouts * max_tokens))


def mini_batch_totals(num_tokens_B: Tensor) -> tuple[int, int]:
    """Return total_tokens and total_rollouts of a mini-batch, from the masked tokens of each of its rollouts.

    A rollout without masked tokens is no part of any mean, so it isn't counted. The counts of several ranks add up.
    """
    return int(num_tokens_B.sum()), int((num_tokens_B > 0).sum())


def token_weights_B(
    mode: str,
    num_tokens_B: Tensor,
    total_tokens: int,
    total_rollouts: int,
    dtype: torch.dtype = torch.float32,
    max_tokens: int | None = None,
) -> Tensor:
    """Return for each of the given rollouts the weight of each of its masked tokens; 0 where it has none.

    num_tokens_B: masked tokens of these rollouts, any subset of the mini-batch. total_tokens, total_rollouts: of the
    whole mini-batch, see ``mini_batch_totals``. max_tokens: of the longest response that can be, which
    seq-mean-token-sum-norm divides by. Raises ConfigError for an unknown mode.
    """
    weigh = aggregations.get(mode)
    count_B = num_tokens_B.double().clamp(min=1.0)
    weights_B = weigh(count_B, max(total_tokens, 1), max(total_rollouts, 1), max_tokens)
    return torch.where(num_tokens_B > 0, weights_B, torch.zeros_like(weights_B)).to(dtype)
