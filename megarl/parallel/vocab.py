"""Per-token log-probs and entropy from logits that are split over the vocabulary; the vocabulary is never gathered.

The work goes in chunks of tokens, forward and backward, and nothing of float32 as large as the logits is ever kept:
beside the logits and their gradient, both in the model's dtype, there is one chunk.

Shape suffixes: L positions of a micro-batch, N predicted tokens among them, C tokens of a chunk, V this rank's slice of
the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_BYTES = 64 << 20  # of one chunk of float32 logits


@dataclass(frozen=True)
class _Slice:
    """How to read this rank's columns. first: their first token id; real: how many are no padding."""

    first: int
    real: int
    temperature: float
    chunk: int

    def chunks(self, count: int) -> Iterator[slice]:
        """Yield the tokens of one chunk after the other."""
        return (slice(start, start + self.chunk) for start in range(0, count, self.chunk))

    def scaled(self, logits_LV: Tensor, rows_C: Tensor) -> Tensor:
        """Return float32 logits [C, V] of some rows, divided by the temperature: a copy, free to be overwritten."""
        chosen_CV = logits_LV[rows_C].float()
        return chosen_CV if self.temperature == 1.0 else chosen_CV.div_(self.temperature)

    def shifted(self, logits_LV: Tensor, rows_C: Tensor, top_C: Tensor) -> Tensor:
        """Return z - top [C, V], a copy."""
        return self.scaled(logits_LV, rows_C).sub_(top_C[:, None])

    def without_padding(self, values_CV: Tensor) -> Tensor:
        """Set padding to 0, in place: garbage times 0 must stay 0."""
        values_CV[:, self.real :] = 0.0
        return values_CV

    def mine(self, targets_C: Tensor) -> tuple[Tensor, Tensor]:
        """Return the column of each target, and whether it is this rank's."""
        local_C = targets_C - self.first
        return local_C.clamp(min=0), (local_C >= 0) & (local_C < self.real)


class _VocabParallelLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_LV: Tensor, rows_N: Tensor, targets_N: Tensor, group: dist.ProcessGroup, columns: _Slice
    ) -> tuple[Tensor, Tensor]:
        top_N = logits_LV.new_full(targets_N.shape, float("-inf"), dtype=torch.float32)
        sums_3N = top_N.new_zeros((3, len(top_N)))
        for part in columns.chunks(len(rows_N)) if columns.real else ():
            top_N[part] = columns.scaled(logits_LV, rows_N[part])[:, : columns.real].amax(-1)
        dist.all_reduce(top_N, op=dist.ReduceOp.MAX, group=group)
        for part in columns.chunks(len(rows_N)):
            shifted_CV = columns.shifted(logits_LV, rows_N[part], top_N[part])
            exp_CV = columns.without_padding(shifted_CV.exp())
            index_C, mine_C = columns.mine(targets_N[part])
            index_C = index_C.clamp(max=shifted_CV.shape[-1] - 1)
            target_C = shifted_CV.gather(-1, index_C[:, None])[:, 0].masked_fill(~mine_C, 0.0)
            weighted_CV = columns.without_padding(shifted_CV).mul_(exp_CV)
            sums_3N[:, part] = torch.stack([exp_CV.sum(-1), weighted_CV.sum(-1), target_C])
        dist.all_reduce(sums_3N, group=group)
        total_N, weighted_N, target_N = sums_3N

        log_total_N = total_N.log()
        entropy_N = log_total_N - weighted_N / total_N
        ctx.columns = columns
        ctx.save_for_backward(logits_LV, rows_N, targets_N, top_N, total_N, entropy_N)
        return target_N - log_total_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        grad_logprobs_N, grad_entropy_N = grads
        columns: _Slice = ctx.columns
        logits_LV, rows_N, targets_N, top_N, total_N, entropy_N = ctx.saved_tensors
        with_entropy = bool(torch.any(grad_entropy_N != 0))
        grad_LV = torch.zeros_like(logits_LV)
        for part in columns.chunks(len(rows_N)):
            shifted_CV = columns.shifted(logits_LV, rows_N[part], top_N[part])
            exp_CV = columns.without_padding(shifted_CV.exp() if with_entropy else shifted_CV.exp_())
            index_C, mine_C = columns.mine(targets_N[part])
            index_C = index_C.clamp(max=exp_CV.shape[-1] - 1)
            probs_CV = exp_CV.div_(total_N[part, None])
            # d logprob / d logit_v = [v = target] - p_v;  d entropy / d logit_v = -p_v (log p_v + entropy)
            by_entropy_CV = None
            if with_entropy:
                log_probs_CV = columns.without_padding(shifted_CV) - total_N[part, None].log()
                by_entropy_CV = probs_CV * (log_probs_CV + entropy_N[part, None]) * grad_entropy_N[part, None]
            grad_CV = probs_CV.mul_(-grad_logprobs_N[part, None])
            grad_CV.scatter_add_(-1, index_C[:, None], (grad_logprobs_N[part] * mine_C)[:, None])
            if by_entropy_CV is not None:
                grad_CV -= by_entropy_CV
            if columns.temperature != 1.0:
                grad_CV /= columns.temperature
            grad_LV[rows_N[part]] = grad_CV.to(grad_LV.dtype)
        return grad_LV, None, None, None, None


def vocab_parallel_logprobs(
    logits_LV: Tensor,
    targets_N: Tensor,
    *,
    group: dist.ProcessGroup,
    vocab_size: int,
    rows_N: Tensor | None = None,
    temperature: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, Tensor]:
    """Return (log p(target), entropy of p), both float32 [N] and differentiable, the same on all ranks of ``group``.

    logits_LV: this rank's slice, rank r holding columns [r V, (r + 1) V). targets_N: global token ids. rows_N: the row
    that predicts each target, every row at most once; all in order by default. vocab_size: the real vocabulary; columns
    past it are padding and get probability 0. p = softmax(logits / temperature), computed in float32.

    log p_t = z_t - log sum_v exp z_v;  H = log sum_v exp z_v - sum_v p_v z_v. Two all-reduces: N and 3 N floats.
    """
    width = logits_LV.shape[-1]
    first = dist.get_rank(group) * width
    real = max(0, min(width, vocab_size - first))
    columns = _Slice(first, real, temperature, max(1, chunk_bytes // (4 * width)))
    if rows_N is None:
        rows_N = torch.arange(len(targets_N), device=logits_LV.device)
    apply: Callable[..., tuple[Tensor, Tensor]] = _VocabParallelLogProbs.apply
    return apply(logits_LV, rows_N, targets_N, group, columns)
