from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megarl.algorithm.aggregate import mini_batch_totals, token_weights_B
from megarl.batching.plan import plan_update
from megarl.errors import ConfigError
from tests.unit import numpy_reference as reference

MODES = ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
MAX_TOKENS = 20


def _mini_batch(seed: int, num_rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Return losses and a mask with holes, with rows of no token and of one."""
    rng = np.random.default_rng(seed)
    mask_BS = rng.random((num_rows, length)) < 0.6
    mask_BS[rng.random(num_rows) < 0.2] = False
    mask_BS[rng.random(num_rows) < 0.2] = np.arange(length) == 0
    return torch.from_numpy(rng.normal(size=mask_BS.shape)), torch.from_numpy(mask_BS)


def _loss_of_rows(mode: str, losses_BS: Tensor, mask_BS: Tensor, rows: list[int]) -> Tensor:
    """Return what one micro-batch adds to the loss, as a rank computes it: its own rows and two global numbers."""
    total_tokens, total_rollouts = mini_batch_totals(mask_BS.sum(1))
    weights_B = token_weights_B(mode, mask_BS[rows].sum(1), total_tokens, total_rollouts, torch.float64, MAX_TOKENS)
    return (weights_B.unsqueeze(1) * mask_BS[rows] * losses_BS[rows]).sum()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (8, 1), (16, 7)])
@pytest.mark.parametrize("seed", range(6))
def test_the_weighted_sum_equals_the_reference(seed: int, shape: tuple[int, int], mode: str) -> None:
    losses_BS, mask_BS = _mini_batch(seed, *shape)
    result = _loss_of_rows(mode, losses_BS, mask_BS, list(range(shape[0]))).item()
    expected = reference.aggregate(mode, losses_BS.numpy(), mask_BS.numpy(), MAX_TOKENS)
    assert result == pytest.approx(expected, rel=1e-10, abs=1e-10)


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    mode=st.sampled_from(MODES),
    dp_and_micro=st.sampled_from([(1, 12), (1, 1), (2, 3), (3, 2), (4, 1), (12, 1)]),
)
def test_loss_and_gradient_do_not_depend_on_ranks_micro_batches_or_order(
    seed: int, mode: str, dp_and_micro: tuple[int, int]
) -> None:
    losses_BS, mask_BS = _mini_batch(seed, 12, 5)
    (step,) = plan_update(12, 12, dp_and_micro[1], dp_and_micro[0], epochs=1, shuffle_seed=seed)
    whole, split = losses_BS.clone().requires_grad_(), losses_BS.clone().requires_grad_()
    expected = _loss_of_rows(mode, whole, mask_BS, list(range(12)))
    expected.backward()
    total = 0.0
    for rank in step.micro_batches_by_rank:
        for rows in rank:
            part = _loss_of_rows(mode, split, mask_BS, list(rows))
            part.backward()
            total += part.item()
    assert total == pytest.approx(expected.item(), rel=1e-12, abs=1e-12)
    torch.testing.assert_close(split.grad, whole.grad, rtol=0, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_a_rollout_without_tokens_has_weight_zero_and_is_no_part_of_the_mean(mode: str) -> None:
    full_B, with_empty_B = torch.tensor([3, 1]), torch.tensor([3, 0, 1, 0])
    expected_B = token_weights_B(mode, full_B, *mini_batch_totals(full_B), max_tokens=MAX_TOKENS)
    weights_B = token_weights_B(mode, with_empty_B, *mini_batch_totals(with_empty_B), max_tokens=MAX_TOKENS)
    assert weights_B[[1, 3]].tolist() == [0.0, 0.0]
    assert torch.equal(weights_B[[0, 2]], expected_B)


@pytest.mark.parametrize("mode", MODES)
def test_a_mini_batch_without_any_token_has_weights_zero(mode: str) -> None:
    assert token_weights_B(mode, torch.tensor([0, 0]), 0, 0, max_tokens=MAX_TOKENS).tolist() == [0.0, 0.0]


def test_weights_of_a_hand_computed_mini_batch() -> None:
    num_tokens_B = torch.tensor([4, 1])
    assert mini_batch_totals(num_tokens_B) == (5, 2)
    assert token_weights_B("token-mean", num_tokens_B, 5, 2).tolist() == pytest.approx([0.2, 0.2])
    assert token_weights_B("seq-mean-token-sum", num_tokens_B, 5, 2).tolist() == [0.5, 0.5]
    assert token_weights_B("seq-mean-token-mean", num_tokens_B, 5, 2).tolist() == [0.125, 0.5]
    assert token_weights_B("seq-mean-token-sum-norm", num_tokens_B, 5, 2, max_tokens=8).tolist() == [0.0625, 0.0625]


def test_an_unknown_mode_is_an_error_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"loss_agg_mode = 'token_mean'.*\n.*did you mean 'token-mean'"):
        token_weights_B("token_mean", torch.tensor([1]), 1, 1)
