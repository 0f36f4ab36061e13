from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from megarl.algorithm.value_loss import clipped_value_loss, explained_variance
from tests.unit import numpy_policy_loss as reference


def _columns(seed: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    new, old, returns = (torch.from_numpy(rng.normal(size=length)) for _ in range(3))
    return new, old, returns


@pytest.mark.parametrize("clip_range", [0.2, 1.0, 1e9])
@pytest.mark.parametrize("length", [1, 50])
def test_the_value_loss_equals_the_reference(length: int, clip_range: float) -> None:
    new, old, returns = _columns(0, length)
    result = clipped_value_loss(new, old, returns, clip_range)
    loss, clipped = reference.value(new.numpy(), old.numpy(), returns.numpy(), clip_range)
    np.testing.assert_allclose(result.loss_N.numpy(), loss, rtol=1e-10, atol=1e-10)
    np.testing.assert_array_equal(result.clipped_N.numpy(), clipped)


def test_without_a_range_nothing_is_clipped() -> None:
    new, old, returns = _columns(1, 50)
    result = clipped_value_loss(new, old, returns)
    torch.testing.assert_close(result.loss_N, 0.5 * (new - returns) ** 2)
    assert not result.clipped_N.any()


def test_a_value_that_ran_out_of_its_range_towards_the_return_has_no_gradient() -> None:
    new = torch.tensor([0.5, 0.1, -0.5], requires_grad=True)
    result = clipped_value_loss(new, torch.zeros(3), torch.ones(3), 0.2)
    (gradient,) = torch.autograd.grad(result.loss_N.sum(), new)
    assert result.clipped_N.tolist() == [1.0, 0.0, 0.0]
    assert gradient.tolist() == pytest.approx([0.0, -0.9, -1.5])


def test_the_gradient_of_the_value_loss_equals_finite_differences() -> None:
    new, old, returns = _columns(2, 30)
    assert clipped_value_loss(new, old, returns, 0.5).clipped_N.mean() > 0.1, "must cover the clip"
    assert torch.autograd.gradcheck(lambda x: clipped_value_loss(x, old, returns, 0.5).loss_N, new.requires_grad_())


def test_explained_variance_is_one_minus_the_share_left() -> None:
    mask_BS = torch.tensor([[True, True, False], [True, True, False]])
    returns_BS = torch.tensor([[1.0, 2.0, 99.0], [3.0, 4.0, 99.0]])
    values_BS = torch.tensor([[1.5, 1.5, -9.0], [3.5, 3.5, -9.0]])
    expected = 1 - np.var([-0.5, 0.5, -0.5, 0.5]) / np.var([1, 2, 3, 4])
    assert explained_variance(values_BS, returns_BS, mask_BS) == pytest.approx(expected)
    assert explained_variance(returns_BS, returns_BS, mask_BS) == 1.0
    assert explained_variance(torch.zeros(2, 3), returns_BS, mask_BS) == 0.0
    assert explained_variance(-returns_BS, returns_BS, mask_BS) < 0


@pytest.mark.parametrize("mask", [True, False])
def test_returns_that_do_not_vary_leave_nothing_to_explain(mask: bool) -> None:
    assert explained_variance(torch.rand(2, 3), torch.full((2, 3), 0.1), torch.full((2, 3), mask)) == 0.0
