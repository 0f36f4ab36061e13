"""Log-probs and entropies from logits that are split over ranks against those of whole logits in float64.

Shape suffixes: N tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megarl.parallel.fused_vocab import fused_vocab_parallel_logprobs
from megarl.parallel.vocab import vocab_parallel_logprobs
from megarl.verify.pool import RankPool

TOLERANCE = 2e-5


def _split(logits_NV: Tensor, targets_N: Tensor, vocab_size: int, weights_2N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probs, entropies and this rank's gradient of their sum weighted by ``weights_2N``.

    logits_NV: of the whole vocabulary with its padding, of which this rank takes its slice.
    """
    mine_NV = logits_NV.chunk(dist.get_world_size(), -1)[dist.get_rank()].clone().requires_grad_()
    group = dist.group.WORLD
    assert group is not None
    logprobs_N, entropy_N = vocab_parallel_logprobs(mine_NV, targets_N, group=group, vocab_size=vocab_size)
    (weights_2N * torch.stack([logprobs_N, entropy_N])).sum().backward()
    assert mine_NV.grad is not None
    return logprobs_N.detach(), entropy_N.detach(), mine_NV.grad


@pytest.mark.parametrize("vocab_size", [99, 5])
def test_four_ranks_agree_with_whole_logits_even_if_one_holds_nothing_but_padding(
    ranks: RankPool, vocab_size: int
) -> None:
    torch.manual_seed(0)
    padded = -(-vocab_size // 4) * 4
    logits_NV = torch.randn(30, padded) * 5
    logits_NV[:, vocab_size:] = 50.0  # padding that would win if it counted
    targets_N, weights_2N = torch.randint(vocab_size, (30,)), torch.randn(2, 30)
    answers = ranks.run(_split, logits_NV, targets_N, vocab_size, weights_2N)

    whole_NV = logits_NV.double().requires_grad_()
    log_softmax_NV = whole_NV[:, :vocab_size].log_softmax(-1)
    logprobs_N = log_softmax_NV.gather(-1, targets_N[:, None])[:, 0]
    entropy_N = -(log_softmax_NV.exp() * log_softmax_NV).sum(-1)
    (weights_2N * torch.stack([logprobs_N, entropy_N])).sum().backward()
    for found in answers:
        torch.testing.assert_close(found[0].double(), logprobs_N.detach(), rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(found[1].double(), entropy_N.detach(), rtol=0, atol=TOLERANCE)
    gradient_NV = torch.cat([found[2] for found in answers], -1).double()
    torch.testing.assert_close(gradient_NV, whole_NV.grad, rtol=0, atol=TOLERANCE)


def _split_weight(
    hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, vocab_size: int, weights_2N: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return log-probs, entropies, and this rank's gradients of hidden states and of its slice of the weight."""
    hidden_NH = hidden_NH.clone().requires_grad_()
    mine_VH = weight_VH.chunk(dist.get_world_size())[dist.get_rank()].clone().requires_grad_()
    group = dist.group.WORLD
    assert group is not None
    logprobs_N, entropy_N = fused_vocab_parallel_logprobs(
        hidden_NH,
        mine_VH,
        targets_N,
        group=group,
        vocab_size=vocab_size,
        rows_N=torch.arange(len(targets_N)),
        chunk_bytes=4 * 7 * len(targets_N),
    )
    (weights_2N * torch.stack([logprobs_N, entropy_N])).sum().backward()
    assert hidden_NH.grad is not None and mine_VH.grad is not None
    return logprobs_N.detach(), entropy_N.detach(), hidden_NH.grad, mine_VH.grad


@pytest.mark.parametrize("vocab_size", [99, 5])
def test_four_ranks_with_a_slice_of_the_weight_each_agree_with_whole_logits(ranks: RankPool, vocab_size: int) -> None:
    torch.manual_seed(0)
    hidden_NH, weight_VH = torch.randn(30, 8), 2 * torch.randn(-(-vocab_size // 4) * 4, 8)
    weight_VH[vocab_size:] = 50.0  # padding that would win if it counted
    targets_N, weights_2N = torch.randint(vocab_size, (30,)), torch.randn(2, 30)
    answers = ranks.run(_split_weight, hidden_NH, weight_VH, targets_N, vocab_size, weights_2N)

    whole = hidden_NH.double().requires_grad_(), weight_VH.double().requires_grad_()
    log_softmax_NV = (whole[0] @ whole[1][:vocab_size].T).log_softmax(-1)
    logprobs_N = log_softmax_NV.gather(-1, targets_N[:, None])[:, 0]
    entropy_N = -(log_softmax_NV.exp() * log_softmax_NV).sum(-1)
    (weights_2N * torch.stack([logprobs_N, entropy_N])).sum().backward()
    for found in answers:
        torch.testing.assert_close(found[0].double(), logprobs_N.detach(), rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(found[1].double(), entropy_N.detach(), rtol=0, atol=TOLERANCE)
    hidden_gradient_NH = torch.stack([found[2] for found in answers]).sum(0).double()
    torch.testing.assert_close(hidden_gradient_NH, whole[0].grad, rtol=1e-5, atol=TOLERANCE)
    weight_gradient_VH = torch.cat([found[3] for found in answers]).double()
    torch.testing.assert_close(weight_gradient_VH, whole[1].grad, rtol=1e-5, atol=TOLERANCE)
