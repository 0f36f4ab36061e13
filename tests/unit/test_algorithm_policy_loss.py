from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megarl.algorithm.policy_loss import PolicyLossInputs, PolicyLossSettings, policy_losses, token_loss
from tests.unit import numpy_policy_loss as reference

NAMES = ["ppo_clip", "gspo", "geo_mean", "cispo", "sapo", "gpg", "clip_cov", "kl_cov"]
# Finite differences see through a stopped gradient, so gspo and cispo have tests of their own.
DIFFERENTIABLE = ["ppo_clip", "geo_mean", "sapo", "gpg", "clip_cov", "kl_cov"]
WIDE = PolicyLossSettings(clip_low=0.2, clip_high=0.28, clip_c=1.5)


def _inputs(seed: int, lengths: list[int], per_rollout: bool = False) -> PolicyLossInputs:
    """Return sequences end to end. per_rollout: advantages are the same on all tokens of a sequence."""
    rng, size = np.random.default_rng(seed), sum(lengths)
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    old = -3 * rng.random(size)
    advantages = rng.normal(size=len(lengths))[sequence] if per_rollout else rng.normal(size=size)
    return PolicyLossInputs(
        logprobs_N=torch.from_numpy(old + 0.4 * rng.normal(size=size)),
        old_logprobs_N=torch.from_numpy(old),
        advantages_N=torch.from_numpy(advantages),
        sequence_N=torch.from_numpy(sequence),
        num_sequences=len(lengths),
        selected_N=torch.from_numpy(rng.random(size) < 0.3),
    )


def _one(log_ratio: float, advantage: float, dtype: torch.dtype = torch.float64) -> PolicyLossInputs:
    logprob = torch.tensor([log_ratio], dtype=dtype, requires_grad=True)
    zero_N, one = torch.zeros(1, dtype=dtype), torch.tensor([advantage], dtype=dtype)
    return PolicyLossInputs(logprob, zero_N, one, torch.tensor([0]), 1, selected_N=torch.tensor([False]))


def _expected(name: str, sequence: reference.Sequence, selected: list[bool], s: PolicyLossSettings) -> reference.Result:
    results: dict[str, Callable[[], reference.Result]] = {
        "ppo_clip": lambda: reference.ppo_clip(sequence, s.clip_low, s.clip_high, s.clip_c),
        "gspo": lambda: reference.gspo(sequence, s.clip_low, s.clip_high),
        "geo_mean": lambda: reference.geo_mean(sequence, s.clip_low, s.clip_high),
        "cispo": lambda: reference.cispo(sequence, s.clip_low, s.clip_high),
        "sapo": lambda: reference.sapo(sequence, s.tau_positive, s.tau_negative),
        "gpg": lambda: reference.gpg(sequence),
        "clip_cov": lambda: reference.clip_cov(sequence, selected, s.clip_low, s.clip_high),
        "kl_cov": lambda: reference.kl_cov(sequence, selected, s.cov_kl_coef),
    }
    return results[name]()


def _gradient(name: str, inputs: PolicyLossInputs, weights_N: Tensor) -> Tensor:
    leaf = inputs.logprobs_N.detach().clone().requires_grad_()
    loss_N = policy_losses.get(name)(replace(inputs, logprobs_N=leaf), WIDE).loss_N
    return torch.autograd.grad((weights_N * loss_N).sum(), leaf)[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [9], [4, 1, 7, 2]])
@pytest.mark.parametrize(
    "given_settings",
    [
        WIDE,
        PolicyLossSettings(clip_c=None),
        PolicyLossSettings(clip_low=0.0, clip_high=0.0, tau_positive=3.0, tau_negative=0.5, cov_kl_coef=0.1),
        PolicyLossSettings(clip_low=1.0, clip_high=5.0, clip_c=1.01),
    ],
)
def test_each_loss_equals_the_reference(name: str, lengths: list[int], given_settings: PolicyLossSettings) -> None:
    inputs = _inputs(len(lengths), lengths)
    result = policy_losses.get(name)(inputs, given_settings)
    columns = (inputs.logprobs_N, inputs.old_logprobs_N, inputs.advantages_N)
    assert inputs.selected_N is not None
    for number in range(len(lengths)):
        mine = inputs.sequence_N == number
        new, old, advantages = (c[mine].numpy() for c in columns)
        selected = inputs.selected_N[mine].tolist()
        loss, clipped = _expected(name, (new, old, advantages), selected, given_settings)
        np.testing.assert_allclose(result.loss_N[mine].numpy(), loss, rtol=1e-10, atol=1e-10)
        np.testing.assert_array_equal(result.clipped_N[mine].numpy(), clipped)


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), name=st.sampled_from(NAMES), per_rollout=st.booleans())
def test_neither_the_split_into_micro_batches_nor_the_packing_order_matters(
    seed: int, name: str, per_rollout: bool
) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 6, size=6).tolist()
    whole = replace(_inputs(seed, lengths, per_rollout), rollout_weights_N=torch.from_numpy(rng.random(sum(lengths))))
    weights_N = torch.from_numpy(rng.random(sum(lengths)))
    expected = policy_losses.get(name)(whole, WIDE)
    expected_gradient = _gradient(name, whole, weights_N)
    for rows in np.array_split(rng.permutation(6), rng.integers(1, 6)):
        places = torch.from_numpy(np.concatenate([np.flatnonzero(whole.sequence_N.numpy() == r) for r in rows]))
        columns = {
            field: getattr(whole, field)[places]
            for field in ("logprobs_N", "old_logprobs_N", "advantages_N", "rollout_weights_N", "selected_N")
        }
        numbers = torch.tensor([rows.tolist().index(int(n)) for n in whole.sequence_N[places]])
        part = PolicyLossInputs(**columns, sequence_N=numbers, num_sequences=len(rows))
        result = policy_losses.get(name)(part, WIDE)
        torch.testing.assert_close(result.loss_N, expected.loss_N[places], rtol=1e-12, atol=1e-12)
        assert torch.equal(result.clipped_N, expected.clipped_N[places])
        gradient = _gradient(name, part, weights_N[places])
        torch.testing.assert_close(gradient, expected_gradient[places], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_the_gradient_of_each_loss_equals_finite_differences(name: str) -> None:
    inputs = _inputs(3, [5, 1, 8, 10])
    if name in ("ppo_clip", "geo_mean", "clip_cov"):
        assert policy_losses.get(name)(inputs, WIDE).clipped_N.mean() > 0.1, "must cover the clip"
    assert torch.autograd.gradcheck(
        lambda x: policy_losses.get(name)(replace(inputs, logprobs_N=x), WIDE).loss_N,
        inputs.logprobs_N.requires_grad_(),
    )


@pytest.mark.parametrize("seed", range(6))
def test_the_gradient_of_gspo_over_a_sequence_is_that_of_its_objective(seed: int) -> None:
    inputs = _inputs(seed, [7], per_rollout=True)
    narrow = inputs.old_logprobs_N + 0.1 * (inputs.logprobs_N - inputs.old_logprobs_N)
    inputs = replace(inputs, logprobs_N=narrow)
    gradient = _gradient("gspo", inputs, torch.full((7,), 1 / 7, dtype=torch.float64))

    def objective(new: np.ndarray) -> float:
        columns = (new, inputs.old_logprobs_N.numpy(), inputs.advantages_N.numpy())
        return float(np.mean(reference.gspo(columns, WIDE.clip_low, WIDE.clip_high)[0]))

    new, step = narrow.numpy(), 1e-6
    differences = [(objective(new + step * e) - objective(new - step * e)) / (2 * step) for e in np.eye(7)]
    np.testing.assert_allclose(gradient.numpy(), differences, rtol=1e-7, atol=1e-9)
    assert gradient.any(), "must not be clipped"


@pytest.mark.parametrize("name", ["gspo", "geo_mean"])
def test_one_token_far_from_the_old_policy_counts_whole_in_its_sequence(name: str) -> None:
    # The mean of log-ratios 30, 0 and 0 is 10; with the token at 20 first, as single ratios are bounded, it were 6.7.
    free = PolicyLossSettings(clip_low=1e9, clip_high=1e9)
    inputs = replace(_inputs(0, [3]), advantages_N=torch.ones(3, dtype=torch.float64))
    inputs = replace(inputs, logprobs_N=inputs.old_logprobs_N + torch.tensor([30.0, 0.0, 0.0]))
    expected = torch.full((3,), -math.exp(10), dtype=torch.float64)
    torch.testing.assert_close(policy_losses.get(name)(inputs, free).loss_N, expected)


def test_a_gspo_sequence_is_clipped_as_a_whole() -> None:
    inputs = replace(_inputs(0, [3]), advantages_N=torch.ones(3, dtype=torch.float64))
    inputs = replace(inputs, logprobs_N=inputs.old_logprobs_N + torch.tensor([2.0, -0.5, 0.0]))
    assert policy_losses.get("gspo")(inputs, WIDE).clipped_N.tolist() == [1.0, 1.0, 1.0]
    assert not _gradient("gspo", inputs, torch.ones(3, dtype=torch.float64)).any()


def test_the_gradient_of_cispo_is_the_policy_gradient_times_the_clipped_ratio() -> None:
    inputs = _inputs(4, [6, 3])
    ratio_N = (inputs.logprobs_N - inputs.old_logprobs_N).exp()
    expected = -ratio_N.clamp(0.8, 1.28) * inputs.advantages_N
    torch.testing.assert_close(_gradient("cispo", inputs, torch.ones(9, dtype=torch.float64)), expected)


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_on_policy_is_the_policy_gradient(name: str) -> None:
    inputs = _inputs(2, [3, 5, 1], per_rollout=True)
    nothing = torch.zeros(9, dtype=torch.bool)
    inputs = replace(inputs, logprobs_N=inputs.old_logprobs_N, selected_N=nothing)
    lengths_N = torch.tensor([3] * 3 + [5] * 5 + [1], dtype=torch.float64)
    gradient = _gradient(name, inputs, 1 / lengths_N)
    torch.testing.assert_close(gradient, -inputs.advantages_N / lengths_N, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["ppo_clip", "clip_cov"])
@pytest.mark.parametrize(
    ("log_ratio", "advantage", "loss", "clipped"),
    [
        (np.log(1.4), 1.0, -1.28, 1.0),  # already likelier than the upper bound allows: no further
        (np.log(1.4), -1.0, 1.4, 0.0),  # likelier but worse: free to come back
        (np.log(0.5), 1.0, -0.5, 0.0),
        (np.log(0.5), -1.0, 0.8, 1.0),
        (0.0, 2.0, -2.0, 0.0),
    ],
)
def test_only_steps_away_from_the_old_policy_are_clipped(
    name: str, log_ratio: float, advantage: float, loss: float, clipped: float
) -> None:
    inputs = _one(log_ratio, advantage)
    result = policy_losses.get(name)(inputs, WIDE)
    assert result.loss_N.item() == pytest.approx(loss)
    assert result.clipped_N.item() == clipped
    (gradient,) = torch.autograd.grad(result.loss_N.sum(), inputs.logprobs_N)
    assert (gradient.item() == 0.0) == bool(clipped)


def test_dual_clip_stops_a_worse_token_at_clip_c_and_a_better_one_never() -> None:
    far = math.log(10.0)
    dual, plain = PolicyLossSettings(clip_c=3.0), PolicyLossSettings(clip_c=None)
    assert policy_losses.get("ppo_clip")(_one(far, -2.0), dual).loss_N.item() == pytest.approx(6.0)
    assert policy_losses.get("ppo_clip")(_one(far, -2.0), dual).clipped_N.item() == 1.0
    assert policy_losses.get("ppo_clip")(_one(far, -2.0), plain).loss_N.item() == pytest.approx(20.0)
    assert policy_losses.get("ppo_clip")(_one(far, 2.0), dual).loss_N.item() == pytest.approx(-2.4)


def test_a_token_that_stands_at_the_bound_of_dual_clip_is_not_yet_clipped() -> None:
    inputs = _one(math.log(3.0), -1.0)
    at_bound = float(inputs.logprobs_N.detach().exp())
    result = policy_losses.get("ppo_clip")(inputs, PolicyLossSettings(clip_c=at_bound))
    assert (result.loss_N.item(), result.clipped_N.item()) == (at_bound, 0.0)
    (gradient,) = torch.autograd.grad(result.loss_N.sum(), inputs.logprobs_N)
    assert gradient.item() == at_bound


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_has_a_gradient_where_the_log_probs_have_one_and_is_a_number_where_they_have_none(name: str) -> None:
    inputs = _one(0.1, 1.0)
    learning = token_loss(name, inputs, WIDE)
    watching = token_loss(name, replace(inputs, logprobs_N=inputs.logprobs_N.detach()), WIDE)
    assert learning.loss_N.requires_grad and not watching.loss_N.requires_grad
    assert learning.loss_N.item() == watching.loss_N.item()


@pytest.mark.parametrize("name", NAMES)
def test_rollout_weights_multiply_loss_and_gradient(name: str) -> None:
    inputs = _inputs(6, [4, 3])
    weights_N = torch.tensor([0.0, 0.5, 2.0, 1.0, 1.0, 0.0, 3.0], dtype=torch.float64)
    weighted = replace(inputs, rollout_weights_N=weights_N)
    expected = weights_N * policy_losses.get(name)(inputs, WIDE).loss_N
    torch.testing.assert_close(policy_losses.get(name)(weighted, WIDE).loss_N, expected)
    ones_N = torch.ones(7, dtype=torch.float64)
    torch.testing.assert_close(_gradient(name, weighted, ones_N), _gradient(name, inputs, weights_N))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("log_ratio", [-1e4, 1e4])
@pytest.mark.parametrize("advantage", [-3.0, 3.0])
def test_a_wild_ratio_stays_finite(name: str, log_ratio: float, advantage: float) -> None:
    inputs = _one(log_ratio, advantage, torch.float32)
    loss_N = policy_losses.get(name)(inputs, WIDE).loss_N
    (gradient,) = torch.autograd.grad(loss_N.sum(), inputs.logprobs_N)
    assert loss_N.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_an_advantage_of_zero_gives_no_gradient(name: str) -> None:
    inputs = replace(_inputs(7, [3, 2]), advantages_N=torch.zeros(5, dtype=torch.float64))
    inputs = replace(inputs, selected_N=torch.zeros(5, dtype=torch.bool))
    assert not _gradient(name, inputs, torch.ones(5, dtype=torch.float64)).any()


@pytest.mark.parametrize("name", NAMES)
def test_a_micro_batch_without_tokens_has_an_empty_loss(name: str) -> None:
    result = policy_losses.get(name)(_inputs(8, [0, 0]), WIDE)
    assert result.loss_N.shape == result.clipped_N.shape == (0,)
