from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.algorithm.advantage import AdvantageInputs, AdvantageSettings, estimators
from megarl.algorithm.returns import generalized_advantages, rewards_to_go, whitened
from tests.unit import numpy_advantage as reference

TOKEN_ESTIMATORS = ["gae", "remax", "reinforce_plus_plus"]
SHAPES = [(1, 1), (1, 9), (7, 1), (6, 8), (3, 70)]
DISCOUNTS = [(1.0, 1.0), (0.9, 0.8), (0.99, 0.0), (1.0, 0.95)]


def _random_inputs(seed: int, num_rows: int, length: int) -> AdvantageInputs:
    """Return masks with holes and masked tails, rows of no token and of one; noise outside the mask."""
    rng = np.random.default_rng(seed)
    mask_BS = rng.random((num_rows, length)) < 0.6
    mask_BS[rng.random(num_rows) < 0.2] = False
    mask_BS[rng.random(num_rows) < 0.2] = np.arange(length) == length // 2
    columns = [torch.from_numpy(rng.normal(size=mask_BS.shape)) for _ in range(2)]
    baseline_B = torch.from_numpy(rng.normal(size=num_rows))
    rewards_B = torch.from_numpy(rng.normal(size=num_rows))
    return AdvantageInputs(rewards_B, torch.arange(num_rows), torch.from_numpy(mask_BS), *columns, baseline_B)


def _columns(inputs: AdvantageInputs) -> tuple[reference.Floats, reference.Floats, reference.Bools]:
    assert inputs.token_rewards_BS is not None and inputs.values_BS is not None
    return inputs.token_rewards_BS.numpy(), inputs.values_BS.numpy(), inputs.mask_BS.numpy()


@pytest.mark.parametrize("discounts", DISCOUNTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_gae_equals_the_reference(seed: int, shape: tuple[int, int], discounts: tuple[float, float]) -> None:
    inputs = _random_inputs(seed, *shape)
    rewards, values, mask = _columns(inputs)
    advantages, returns = reference.gae(rewards, values, mask, *discounts)
    result = estimators.get("gae")(inputs, AdvantageSettings(gamma=discounts[0], lam=discounts[1]))
    assert result.returns_BS is not None
    np.testing.assert_allclose(result.returns_BS.numpy(), returns, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(result.advantages_BS.numpy(), reference.whiten(advantages, mask), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_reinforce_plus_plus_equals_the_reference(gamma: float, shape: tuple[int, int]) -> None:
    inputs = _random_inputs(4, *shape)
    rewards, _, mask = _columns(inputs)
    result = estimators.get("reinforce_plus_plus")(inputs, AdvantageSettings(gamma=gamma))
    expected = reference.whiten(reference.rewards_to_go(rewards, mask, gamma), mask)
    np.testing.assert_allclose(result.advantages_BS.numpy(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_remax_equals_the_reference(shape: tuple[int, int]) -> None:
    inputs = _random_inputs(5, *shape)
    rewards, _, mask = _columns(inputs)
    assert inputs.baseline_B is not None
    result = estimators.get("remax")(inputs, AdvantageSettings()).advantages_BS
    np.testing.assert_allclose(
        result.numpy(), reference.remax(rewards, inputs.baseline_B.numpy(), mask), rtol=1e-10, atol=1e-10
    )


def test_gae_of_a_hand_computed_rollout_steps_over_a_hole() -> None:
    mask_BS = torch.tensor([[False, True, False, True, False]])
    rewards_BS = torch.tensor([[9.0, 1.0, 9.0, 2.0, 9.0]])
    values_BS = torch.tensor([[7.0, 0.5, 7.0, 1.5, 7.0]])
    advantages_BS, returns_BS = generalized_advantages(rewards_BS, values_BS, mask_BS, gamma=0.5, lam=0.5)
    # delta of the second token: 2 - 1.5; of the first: 1 + 0.5 * 1.5 - 0.5.
    assert advantages_BS.tolist() == [[0.0, 1.25 + 0.25 * 0.5, 0.0, 0.5, 0.0]]
    assert returns_BS.tolist() == [[0.0, 1.875, 0.0, 2.0, 0.0]]


def test_without_token_rewards_the_score_is_on_the_last_token() -> None:
    inputs = _random_inputs(6, 5, 6)
    plain = replace(inputs, token_rewards_BS=None)
    result = estimators.get("remax")(plain, AdvantageSettings()).advantages_BS
    assert inputs.baseline_B is not None
    expected_BS = torch.where(inputs.mask_BS, (inputs.rewards_B - inputs.baseline_B).unsqueeze(1), 0.0)
    torch.testing.assert_close(result, expected_BS, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_a_perfect_critic_leaves_no_advantage(lam: float) -> None:
    rewards_BS = torch.rand(4, 9, dtype=torch.float64)
    mask_BS = torch.ones(4, 9, dtype=torch.bool)
    values_BS = rewards_to_go(rewards_BS, mask_BS, 0.9)
    advantages_BS, returns_BS = generalized_advantages(rewards_BS, values_BS, mask_BS, 0.9, lam)
    torch.testing.assert_close(advantages_BS, torch.zeros_like(advantages_BS), rtol=0, atol=1e-12)
    torch.testing.assert_close(returns_BS, values_BS, rtol=1e-12, atol=1e-12)


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), name=st.sampled_from(TOKEN_ESTIMATORS))
def test_padding_holes_and_the_order_of_rows_change_nothing(seed: int, name: str) -> None:
    inputs, rng = _random_inputs(seed, 5, 6), np.random.default_rng(seed)
    order = torch.from_numpy(rng.permutation(5))
    places = torch.from_numpy(np.sort(rng.choice(11, 6, replace=False)))

    def moved(values_BS: torch.Tensor) -> torch.Tensor:
        spread_BS = torch.full((5, 11), 99.0, dtype=torch.float64).to(values_BS.dtype)
        spread_BS[:, places] = values_BS[order]
        return spread_BS

    assert inputs.token_rewards_BS is not None and inputs.values_BS is not None and inputs.baseline_B is not None
    mask_BS = torch.zeros(5, 11, dtype=torch.bool)
    mask_BS[:, places] = inputs.mask_BS[order]
    other = AdvantageInputs(
        inputs.rewards_B[order],
        inputs.group_B[order],
        mask_BS,
        moved(inputs.token_rewards_BS),
        moved(inputs.values_BS),
        inputs.baseline_B[order],
    )
    estimate, discounts = estimators.get(name), AdvantageSettings(gamma=0.9, lam=0.8)
    expected_BS = estimate(inputs, discounts).advantages_BS[order]
    result_BS = estimate(other, discounts).advantages_BS
    torch.testing.assert_close(result_BS[:, places], expected_BS, rtol=1e-9, atol=1e-9)
    assert not result_BS[~mask_BS].any()


@pytest.mark.parametrize("name", TOKEN_ESTIMATORS)
def test_what_lies_outside_the_mask_is_never_read(name: str) -> None:
    inputs = _random_inputs(8, 6, 7)
    assert inputs.token_rewards_BS is not None and inputs.values_BS is not None
    nan_outside = [torch.where(inputs.mask_BS, c, float("nan")) for c in (inputs.token_rewards_BS, inputs.values_BS)]
    noisy = replace(inputs, token_rewards_BS=nan_outside[0], values_BS=nan_outside[1])
    expected_BS = estimators.get(name)(inputs, AdvantageSettings()).advantages_BS
    assert torch.equal(estimators.get(name)(noisy, AdvantageSettings()).advantages_BS, expected_BS)


@pytest.mark.parametrize("name", TOKEN_ESTIMATORS)
def test_a_step_without_any_token_gives_zeros(name: str) -> None:
    inputs = _random_inputs(9, 3, 4)
    nothing = replace(inputs, mask_BS=torch.zeros(3, 4, dtype=torch.bool))
    assert not estimators.get(name)(nothing, AdvantageSettings()).advantages_BS.any()


@pytest.mark.parametrize("value", [0.1, -1e9 / 3])
@pytest.mark.parametrize("count", [1, 7])
def test_equal_values_whiten_to_exactly_zero(value: float, count: int) -> None:
    assert not whitened(torch.full((1, count), value), torch.ones(1, count, dtype=torch.bool)).any()


def test_float32_in_gives_float32_out() -> None:
    inputs = _random_inputs(10, 4, 5)
    single = replace(inputs, rewards_B=inputs.rewards_B.float())
    result = estimators.get("gae")(single, AdvantageSettings())
    assert result.returns_BS is not None
    assert (result.advantages_BS.dtype, result.returns_BS.dtype) == (torch.float32, torch.float32)


def test_a_nan_reward_stays_in_its_rollout() -> None:
    rewards_BS = torch.tensor([[0.0, float("nan"), 1.0], [0.0, 0.0, 1.0]])
    result_BS = rewards_to_go(rewards_BS, torch.ones(2, 3, dtype=torch.bool), 0.5)
    assert result_BS[0].isnan().tolist() == [True, True, False]
    assert result_BS[1].tolist() == [0.25, 0.5, 1.0]
