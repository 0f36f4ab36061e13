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
class VocabSlice:
    """How to read columns of logits. first: the token id of the first; real: how many are no padding."""

    first: int
    real: int
    temperature: float

    @staticmethod
    def of_rank(width: int, group: dist.ProcessGroup | None, vocab_size: int, temperature: float) -> VocabSlice:
        """Return this rank's ``width`` columns of a vocabulary of ``vocab_size`` real tokens; all where no group is."""
        first = 0 if group is None else dist.get_rank(group) * width
        return VocabSlice(first, max(0, min(width, vocab_size - first)), temperature)

    def scaled(self, copied_CV: Tensor) -> Tensor:
        """Return float32 logits [C, V] divided by the temperature. copied_CV: a copy, free to be overwritten."""
        logits_CV = copied_CV.float()
        return logits_CV if self.temperature == 1.0 else logits_CV.div_(self.temperature)

    def without_padding(self, values_CV: Tensor) -> Tensor:
        """Set padding to 0, in place: garbage times 0 must stay 0."""
        values_CV[:, self.real :] = 0.0
        return values_CV

    def of_targets(self, values_CV: Tensor, targets_C: Tensor) -> Tensor:
        """Return the value [C] in the column of each target, 0 where that is not among these."""
        index_C, mine_C = self._columns(values_CV, targets_C)
        return values_CV.gather(-1, index_C[:, None])[:, 0].masked_fill(~mine_C, 0.0)

    def sums(self, shifted_CV: Tensor) -> tuple[Tensor, Tensor]:
        """Return sum_v exp z_v and sum_v z_v exp z_v, both [C]; overwrites ``shifted_CV``, which is z."""
        exp_CV = self.without_padding(shifted_CV.exp())
        weighted_CV = self.without_padding(shifted_CV).mul_(exp_CV)
        return exp_CV.sum(-1), weighted_CV.sum(-1)

    def gradient(
        self,
        shifted_CV: Tensor,
        targets_C: Tensor,
        total_C: Tensor,
        entropy_C: Tensor,
        grad_logprobs_C: Tensor,
        grad_entropy_C: Tensor | None,
    ) -> Tensor:
        """Return the float32 gradient [C, V] of the logits before the temperature; overwrites ``shifted_CV``.

        shifted_CV: z - top. total_C: sum_v exp(z_v - top). grad_entropy_C: None where it is 0.
        """
        exp_CV = self.without_padding(shifted_CV.exp_() if grad_entropy_C is None else shifted_CV.exp())
        index_C, mine_C = self._columns(exp_CV, targets_C)
        probs_CV = exp_CV.div_(total_C[:, None])
        # d logprob / d logit_v = [v = target] - p_v;  d entropy / d logit_v = -p_v (log p_v + entropy)
        by_entropy_CV = None
        if grad_entropy_C is not None:
            log_probs_CV = self.without_padding(shifted_CV).sub_(total_C[:, None].log())
            by_entropy_CV = log_probs_CV.add_(entropy_C[:, None]).mul_(probs_CV).mul_(grad_entropy_C[:, None])
        grad_CV = probs_CV.mul_(-grad_logprobs_C[:, None])
        grad_CV.scatter_add_(-1, index_C[:, None], (grad_logprobs_C * mine_C)[:, None])
        if by_entropy_CV is not None:
            grad_CV -= by_entropy_CV
        return grad_CV if self.temperature == 1.0 else grad_CV.div_(self.temperature)

    def _columns(self, values_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
        """Return a column that exists for each target, and whether it is the target's."""
        local_C = targets_C - self.first
        return local_C.clamp(min=0, max=values_CV.shape[-1] - 1), (local_C >= 0) & (local_C < self.real)


class _VocabParallelLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_LV: Tensor,
        rows_N: Tensor,
        targets_N: Tensor,
        group: dist.ProcessGroup | None,
        columns: VocabSlice,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        top_N = logits_LV.new_full(targets_N.shape, float("-inf"), dtype=torch.float32)
        sums_3N = top_N.new_zeros((3, len(top_N)))
        for part in _chunks(len(rows_N), chunk) if columns.real else ():
            top_N[part] = columns.scaled(logits_LV[rows_N[part]])[:, : columns.real].amax(-1)
        reduce_over(group, top_N, dist.ReduceOp.MAX)
        for part in _chunks(len(rows_N), chunk):
            shifted_CV = columns.scaled(logits_LV[rows_N[part]]).sub_(top_N[part, None])
            target_C = columns.of_targets(shifted_CV, targets_N[part])
            sums_3N[:, part] = torch.stack([*columns.sums(shifted_CV), target_C])
        reduce_over(group, sums_3N)
        total_N, weighted_N, target_N = sums_3N

        log_total_N = total_N.log()
        entropy_N = log_total_N - weighted_N / total_N
        ctx.columns, ctx.chunk = columns, chunk
        ctx.set_materialize_grads(False)  # None says that a loss has no entropy, without a look at the device
        ctx.save_for_backward(logits_LV, rows_N, targets_N, top_N, total_N, entropy_N)
        return target_N - log_total_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None, None, None, None, None]:
        columns: VocabSlice = ctx.columns
        logits_LV, rows_N, targets_N, top_N, total_N, entropy_N = ctx.saved_tensors
        grad_logprobs_N, grad_entropy_N = of_logprobs(grads)
        grad_LV = torch.zeros_like(logits_LV)
        for part in _chunks(len(rows_N), ctx.chunk):
            grad_CV = columns.gradient(
                columns.scaled(logits_LV[rows_N[part]]).sub_(top_N[part, None]),
                targets_N[part],
                total_N[part],
                entropy_N[part],
                grad_logprobs_N[part],
                None if grad_entropy_N is None else grad_entropy_N[part],
            )
            grad_LV[rows_N[part]] = grad_CV.to(grad_LV.dtype)
        return grad_LV, None, None, None, None, None


def of_logprobs(grads: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of log-probs and entropies, the first of which may be 0 and the second None."""
    of_logprobs_N, of_entropy_N = grads
    if of_logprobs_N is None:
        assert of_entropy_N is not None
        of_logprobs_N = torch.zeros_like(of_entropy_N)
    return of_logprobs_N, of_entropy_N


def reduce_over(group: dist.ProcessGroup | None, numbers: Tensor, op: Any = dist.ReduceOp.SUM) -> None:
    """Reduce ``numbers`` in place over the ranks of a group; without one they are whole."""
    if group is not None:
        dist.all_reduce(numbers, op=op, group=group)


def _chunks(count: int, size: int) -> Iterator[slice]:
    """Yield the tokens of one chunk after the other."""
    return (slice(start, start + size) for start in range(0, count, size))


def vocab_parallel_logprobs(
    logits_LV: Tensor,
    targets_N: Tensor,
    *,
    group: dist.ProcessGroup | None,
    vocab_size: int,
    rows_N: Tensor | None = None,
    temperature: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, Tensor]:
    """Return (log p(target), entropy of p), both float32 [N] and differentiable, the same on all ranks of ``group``.

    logits_LV: this rank's slice, rank r holding columns [r V, (r + 1) V). group: None where that is all of them.
    targets_N: global token ids. rows_N: the row that predicts each target, every row at most once; all in order by
    default. vocab_size: the real vocabulary; columns past it are padding and get probability 0.
    p = softmax(logits / temperature), computed in float32.

    log p_t = z_t - log sum_v exp z_v;  H = log sum_v exp z_v - sum_v p_v z_v. Two all-reduces: N and 3 N floats.
    """
    width = logits_LV.shape[-1]
    columns = VocabSlice.of_rank(width, group, vocab_size, temperature)
    if rows_N is None:
        rows_N = torch.arange(len(targets_N), device=logits_LV.device)
    apply: Callable[..., tuple[Tensor, Tensor]] = _VocabParallelLogProbs.apply
    return apply(logits_LV, rows_N, targets_N, group, columns, max(1, chunk_bytes // (4 * width)))
