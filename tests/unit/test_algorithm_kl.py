from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from megarl.algorithm.kl import kl_estimators
from tests.unit import numpy_reference as reference

NAMES = ["kl", "abs", "mse", "low_var_kl", "k1", "k2", "k3"]
STRAIGHT_THROUGH = ["kl", "kl+", "abs+", "low_var_kl+", "k1+", "k3+"]


def _columns(seed: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ref = -3 * torch.rand(shape, generator=generator, dtype=torch.float64)
    return ref + 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64), ref


def _distributions(seed: int) -> tuple[Tensor, Tensor]:
    """Return the log-probs of an actor and a reference over a vocabulary of 11."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 11, generator=generator, dtype=torch.float64)
    actor, ref = torch.log_softmax(0.5 * logits, dim=-1)
    return actor, ref


@pytest.mark.parametrize("name", NAMES + STRAIGHT_THROUGH)
@pytest.mark.parametrize("shape", [(1, 1), (4, 9), (37,)])
def test_each_estimator_equals_the_reference(name: str, shape: tuple[int, ...]) -> None:
    actor, ref = _columns(0, shape)
    result = kl_estimators.get(name)(actor, ref)
    np.testing.assert_allclose(result.numpy(), reference.kl(name, actor.numpy(), ref.numpy()), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NAMES + STRAIGHT_THROUGH)
def test_equal_policies_have_exactly_no_kl(name: str) -> None:
    logprobs = torch.tensor([[0.0, -1e-7, -0.3, -50.0]])
    assert not kl_estimators.get(name)(logprobs, logprobs.clone()).any()


@pytest.mark.parametrize("name", ["abs", "mse", "low_var_kl"])
def test_all_but_k1_are_never_negative(name: str) -> None:
    difference = torch.cat([torch.logspace(-8, 2, 200), -torch.logspace(-8, 2, 200)])
    assert (kl_estimators.get(name)(difference, torch.zeros(400)) >= 0).all()


@pytest.mark.parametrize("name", ["kl", "low_var_kl"])
def test_k1_and_k3_are_unbiased(name: str) -> None:
    actor, ref = _distributions(1)
    exact = (actor.exp() * (actor - ref)).sum()
    torch.testing.assert_close((actor.exp() * kl_estimators.get(name)(actor, ref)).sum(), exact, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in STRAIGHT_THROUGH])
def test_the_gradient_of_each_estimator_equals_finite_differences(name: str) -> None:
    actor, ref = _columns(2, (4, 6))
    assert torch.autograd.gradcheck(lambda x: kl_estimators.get(name)(x, ref), actor.requires_grad_())


@pytest.mark.parametrize("name", STRAIGHT_THROUGH)
def test_a_straight_through_estimator_has_its_own_value_and_the_gradient_of_mse(name: str) -> None:
    actor, ref = _columns(5, (4, 6))
    actor.requires_grad_()
    value = kl_estimators.get(name)(actor, ref)
    plain = kl_estimators.get("k1" if name == "kl" else name.removesuffix("+"))(actor, ref)
    torch.testing.assert_close(value, plain, rtol=0, atol=0)
    gradients = [torch.autograd.grad(v.sum(), actor)[0] for v in (value, kl_estimators.get("mse")(actor, ref))]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("k1", "nothing"),
        ("kl", "KL(actor || ref)"),
        ("mse", "KL(actor || ref)"),
        ("low_var_kl", "KL(ref || actor)"),
        ("kl+", "KL(actor || ref)"),
        ("low_var_kl+", "KL(actor || ref)"),
    ],
)
def test_the_expected_gradient_on_policy_is_the_documented_one(name: str, target: str) -> None:
    logits = _distributions(3)[0].requires_grad_()
    ref = _distributions(4)[1]
    actor = torch.log_softmax(logits, dim=-1)
    # The expectation over sampled tokens: the sampling probability is a constant, as it is in training.
    (gradient,) = torch.autograd.grad(
        (actor.detach().exp() * kl_estimators.get(name)(actor, ref)).sum(), logits, retain_graph=True
    )
    exact = {
        "nothing": 0.0 * actor.sum(),
        "KL(actor || ref)": (actor.exp() * (actor - ref)).sum(),
        "KL(ref || actor)": (ref.exp() * (ref - actor)).sum(),
    }[target]
    torch.testing.assert_close(gradient, torch.autograd.grad(exact, logits)[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("log_ratio", [-1e4, -100.0, 100.0, 1e4])
def test_k3_is_bounded_and_finite_on_a_token_that_one_policy_rules_out(log_ratio: float) -> None:
    actor = torch.tensor([log_ratio], requires_grad=True)
    value = kl_estimators.get("low_var_kl")(actor, torch.zeros(1))
    (gradient,) = torch.autograd.grad(value.sum(), actor)
    assert value.item() == 10.0
    assert gradient.item() == 0.0


def test_k3_in_float32_keeps_its_digits_where_the_policies_nearly_agree() -> None:
    difference = 1e-4
    value = kl_estimators.get("low_var_kl")(torch.tensor([0.0]), torch.tensor([difference]))
    assert value.item() == pytest.approx(math.expm1(difference) - difference, rel=1e-2)
