"""Per-token log-probs and entropy from logits that are split over the vocabulary; the vocabulary is never gathered.

Shape suffixes: N tokens, V this rank's slice of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _VocabParallelLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, targets_N: Tensor, group: dist.ProcessGroup, vocab_size: int
    ) -> tuple[Tensor, Tensor]:
        width = logits_NV.shape[-1]
        first = dist.get_rank(group) * width
        real = max(0, min(width, vocab_size - first))  # columns past the vocabulary are padding

        top_N = logits_NV[:, :real].amax(-1) if real else logits_NV.new_full(targets_N.shape, float("-inf"))
        dist.all_reduce(top_N, op=dist.ReduceOp.MAX, group=group)
        shifted_NV = logits_NV - top_N[:, None]
        exp_NV = shifted_NV.exp()
        exp_NV[:, real:] = 0.0

        local_N = targets_N - first
        mine_N = (local_N >= 0) & (local_N < real)
        index_N = local_N.clamp(0, width - 1)
        target_N = shifted_NV.gather(-1, index_N[:, None])[:, 0].masked_fill(~mine_N, 0.0)
        shifted_NV[:, real:] = 0.0  # 0 * garbage must stay 0 below
        sums_3N = torch.stack([exp_NV.sum(-1), (exp_NV * shifted_NV).sum(-1), target_N])
        dist.all_reduce(sums_3N, group=group)
        total_N, weighted_N, target_N = sums_3N

        log_total_N = total_N.log()
        logprobs_N = target_N - log_total_N
        entropy_N = log_total_N - weighted_N / total_N
        probs_NV = exp_NV.div_(total_N[:, None])
        ctx.save_for_backward(probs_NV, shifted_NV, log_total_N, entropy_N, index_N, mine_N)
        return logprobs_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        grad_logprobs_N, grad_entropy_N = grads
        probs_NV, shifted_NV, log_total_N, entropy_N, index_N, mine_N = ctx.saved_tensors
        # d logprob / d logit_v = [v = target] - p_v;  d entropy / d logit_v = -p_v (log p_v + entropy)
        grad_NV = probs_NV * -grad_logprobs_N[:, None]
        grad_NV.scatter_add_(-1, index_N[:, None], (grad_logprobs_N * mine_N)[:, None])
        if ctx.needs_input_grad[0] and torch.any(grad_entropy_N != 0):
            log_probs_NV = shifted_NV - log_total_N[:, None]
            grad_NV -= probs_NV * (log_probs_NV + entropy_N[:, None]) * grad_entropy_N[:, None]
        return grad_NV, None, None, None


def vocab_parallel_logprobs(
    logits_NV: Tensor, targets_N: Tensor, *, group: dist.ProcessGroup, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Return (log p(target), entropy of p), both float32 [N] and differentiable, the same on all ranks of ``group``.

    logits_NV: this rank's slice, rank r holding columns [r V, (r + 1) V). targets_N: global token ids.
    vocab_size: the real vocabulary; columns past it are padding and get probability 0.
    log p_t = z_t - log sum_v exp z_v;  H = log sum_v exp z_v - sum_v p_v z_v. Two all-reduces: N and 3 N floats.
    """
    apply: Callable[..., tuple[Tensor, Tensor]] = _VocabParallelLogProbs.apply
    return apply(logits_NV.float(), targets_N, group, vocab_size)
