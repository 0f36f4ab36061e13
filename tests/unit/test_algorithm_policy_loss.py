from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from megarl.algorithm.policy_loss import ppo_clip
from tests.unit import numpy_reference as reference


def _columns(seed: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(shape, generator=generator, dtype=torch.float64)
    new = old + 0.4 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return new, old, torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(1, 1), (4, 9), (37,)])
@pytest.mark.parametrize("clip", [(0.2, 0.2), (0.2, 0.28), (0.0, 0.0), (0.9, 5.0)])
def test_ppo_clip_equals_the_reference(shape: tuple[int, ...], clip: tuple[float, float]) -> None:
    new, old, advantages = _columns(1, shape)
    result = ppo_clip(new, old, advantages, clip_low=clip[0], clip_high=clip[1])
    loss, clipped = reference.ppo_clip(new.numpy(), old.numpy(), advantages.numpy(), *clip)
    np.testing.assert_allclose(result.loss.numpy(), loss, rtol=1e-10, atol=1e-10)
    np.testing.assert_array_equal(result.clipped.numpy(), clipped)


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "loss", "clipped"),
    [
        (np.log(1.5), 1.0, -1.28, 1.0),  # already likelier than the upper bound allows: no further
        (np.log(1.5), -1.0, 1.5, 0.0),  # likelier but worse: free to come back
        (np.log(0.5), 1.0, -0.5, 0.0),
        (np.log(0.5), -1.0, 0.8, 1.0),
        (0.0, 2.0, -2.0, 0.0),
    ],
)
def test_only_steps_away_from_the_old_policy_are_clipped(
    log_ratio: float, advantage: float, loss: float, clipped: float
) -> None:
    new = torch.tensor([log_ratio], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    result = ppo_clip(new, zero, torch.tensor([advantage], dtype=torch.float64), clip_low=0.2, clip_high=0.28)
    assert result.loss.item() == pytest.approx(loss)
    assert result.clipped.item() == clipped
    (gradient,) = torch.autograd.grad(result.loss.sum(), new)
    assert (gradient.item() == 0.0) == bool(clipped)


def test_the_gradient_on_policy_is_the_policy_gradient() -> None:
    _, old, advantages = _columns(2, (3, 5))
    new = old.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(ppo_clip(new, old, advantages, clip_low=0.2, clip_high=0.2).loss.sum(), new)
    torch.testing.assert_close(gradient, -advantages, rtol=1e-12, atol=1e-12)


def test_the_gradient_of_ppo_clip_equals_finite_differences() -> None:
    new, old, advantages = _columns(3, (4, 6))
    assert ppo_clip(new, old, advantages, clip_low=0.2, clip_high=0.28).clipped.mean() > 0.1, "must cover the clip"
    assert torch.autograd.gradcheck(
        lambda x: ppo_clip(x, old, advantages, clip_low=0.2, clip_high=0.28).loss, new.requires_grad_()
    )


def test_padding_has_loss_zero_and_gradient_zero() -> None:
    padding = torch.zeros(2, 3, requires_grad=True)
    result = ppo_clip(padding, torch.zeros(2, 3), torch.zeros(2, 3), clip_low=0.2, clip_high=0.2)
    (gradient,) = torch.autograd.grad(result.loss.sum(), padding)
    assert not result.loss.any()
    assert not result.clipped.any()
    assert not gradient.any()


@pytest.mark.parametrize("log_ratio", [-1e4, 1e4])
@pytest.mark.parametrize("advantage", [-3.0, 3.0])
def test_a_wild_ratio_stays_finite(log_ratio: float, advantage: float) -> None:
    new = torch.tensor([log_ratio], requires_grad=True)
    loss = ppo_clip(new, torch.zeros(1), torch.tensor([advantage]), clip_low=0.2, clip_high=0.2).loss
    (gradient,) = torch.autograd.grad(loss.sum(), new)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()
