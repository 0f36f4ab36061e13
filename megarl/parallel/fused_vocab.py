"""Per-token log-probs and entropy from hidden states: output layer and log-probs in one, so that no logits are kept.

The work goes in blocks of columns of the vocabulary, each over all tokens, and the backward pass computes a block's
logits again. With blocks of tokens instead, every one would add its part to the gradient of the whole weight, which in
bfloat16 needs a copy in float32 to add up in. So each row of that gradient is one product over all tokens, as without
blocks; what adds up over blocks is the much smaller gradient of the hidden states, in float32.

Shape suffixes: L positions of a micro-batch, N predicted tokens among them, H hidden, V this rank's slice of the
vocabulary, C columns of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.parallel.vocab import CHUNK_BYTES, VocabSlice, of_logprobs, reduce_over

_ALIGNED = 128  # columns, so that matrix units run at full speed
_LEAST = torch.finfo(torch.float32).min  # in place of -inf, of which differences are no numbers


class _FusedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        targets_N: Tensor,
        group: dist.ProcessGroup | None,
        columns: VocabSlice,
        width: int,
    ) -> tuple[Tensor, Tensor]:
        own_top_N = hidden_NH.new_full(targets_N.shape, _LEAST, dtype=torch.float32)
        sums_3N = own_top_N.new_zeros((3, len(own_top_N)))
        for part, block in _blocks(columns, width):
            logits_NC = block.scaled(hidden_NH @ weight_VH[part].T)
            before_N, own_top_N = own_top_N, torch.maximum(own_top_N, logits_NC.amax(-1))
            _lower(sums_3N, before_N - own_top_N)
            target_N = block.of_targets(logits_NC, targets_N)
            sums_3N += torch.stack([*block.sums(logits_NC.sub_(own_top_N[:, None])), target_N])
        top_N = own_top_N.clone()
        reduce_over(group, top_N, dist.ReduceOp.MAX)
        _lower(sums_3N, own_top_N - top_N)
        reduce_over(group, sums_3N)
        total_N, weighted_N, target_N = sums_3N

        log_total_N = total_N.log()
        entropy_N = log_total_N - weighted_N / total_N
        ctx.columns, ctx.width = columns, width
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden_NH, weight_VH, targets_N, top_N, total_N, entropy_N)
        return target_N - top_N - log_total_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, Tensor, None, None, None, None]:
        grad_logprobs_N, grad_entropy_N = of_logprobs(grads)
        columns: VocabSlice = ctx.columns
        hidden_NH, weight_VH, targets_N, top_N, total_N, entropy_N = ctx.saved_tensors
        grad_hidden_NH = torch.zeros_like(hidden_NH, dtype=torch.float32)
        grad_weight_VH = torch.empty_like(weight_VH)
        grad_weight_VH[columns.real :] = 0.0
        for part, block in _blocks(columns, ctx.width):
            grad_NC = block.gradient(
                block.scaled(hidden_NH @ weight_VH[part].T).sub_(top_N[:, None]),
                targets_N,
                total_N,
                entropy_N,
                grad_logprobs_N,
                grad_entropy_N,
            ).to(weight_VH.dtype)
            torch.mm(grad_NC.T, hidden_NH, out=grad_weight_VH[part])
            grad_hidden_NH += grad_NC @ weight_VH[part]
        return grad_hidden_NH.to(hidden_NH.dtype), grad_weight_VH, None, None, None, None


def _blocks(columns: VocabSlice, width: int) -> Iterator[tuple[slice, VocabSlice]]:
    """Yield a rank's real columns, ``width`` at a time: where they are, and how to read them."""
    for start in range(0, columns.real, width):
        stop = min(start + width, columns.real)
        yield slice(start, stop), replace(columns, first=columns.first + start, real=stop - start)


def _lower(sums_3N: Tensor, by_N: Tensor) -> None:
    """Make sums over exp(z) and z exp(z), the first two, those over z + ``by_N``, which is never above 0, in place."""
    sums_3N[1] += by_N * sums_3N[0]
    sums_3N[:2] *= by_N.exp()


def fused_vocab_parallel_logprobs(
    hidden_LH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    group: dist.ProcessGroup | None,
    vocab_size: int,
    rows_N: Tensor,
    temperature: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, Tensor]:
    """Return log-probs and entropies of the logits hidden_LH @ weight_VH.T, those of ``vocab_parallel_logprobs``
    up to rounding.

    hidden_LH: the same on all ranks of ``group``; their gradients, of which each rank returns its part, are to be
    added up by the caller. weight_VH: this rank's slice. rows_N: the row that predicts each target; the others are not
    computed. chunk_bytes: of a block of float32 logits.

    Block by block the largest logit so far is what exponents are relative to: sums over exp(z - m) become such over
    exp(z - m') by a factor exp(m - m') (Milakov and Gimelshein, 2018, arXiv 1805.02867). Two all-reduces: N and 3 N
    floats.
    """
    columns = VocabSlice.of_rank(len(weight_VH), group, vocab_size, temperature)
    width = max(1, chunk_bytes // (4 * max(1, len(targets_N))))
    if width > _ALIGNED:
        width -= width % _ALIGNED
    apply: Callable[..., tuple[Tensor, Tensor]] = _FusedLogProbs.apply
    return apply(hidden_LH.index_select(0, rows_N), weight_VH, targets_N, group, columns, width)
