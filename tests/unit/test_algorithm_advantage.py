from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.algorithm.advantage import (
    AdvantageInputs,
    Advantages,
    AdvantageSettings,
    estimators,
    gdpo,
    grpo,
    grpo_passk,
    rloo,
)
from megarl.algorithm.token_rewards import penalize_rewards
from tests.unit import numpy_advantage
from tests.unit import numpy_reference as reference
from tests.unit.numpy_reference import Bools, Floats, Ints

SETTINGS = AdvantageSettings()
GROUP_ESTIMATORS = ["grpo", "rloo", "opo", "gpg", "grpo_passk", "reinforce_plus_plus_baseline"]
SHAPES = [(1, 1, 1), (1, 2, 1), (5, 1, 3), (3, 4, 7), (16, 8, 5)]


def _random_inputs(seed: int, num_groups: int, group_size: int, length: int) -> AdvantageInputs:
    """Return shuffled rows, labels with gaps, masks with holes, and some rollouts without any masked token."""
    rng = np.random.default_rng(seed)
    group_B = rng.permutation(np.repeat(np.arange(num_groups) * 7 - 3, group_size))
    mask_BS = rng.random((len(group_B), length)) < 0.5
    mask_BS[rng.random(len(group_B)) < 0.2] = False
    rewards_B = rng.choice([0.0, 0.1, 1.0, -2.5], len(group_B)) + rng.choice([0.0, 1e-3], len(group_B))
    return AdvantageInputs(torch.from_numpy(rewards_B), torch.from_numpy(group_B), torch.from_numpy(mask_BS))


def _inputs(rewards: list[float], groups: list[int], dtype: torch.dtype = torch.float64) -> AdvantageInputs:
    mask_BS = torch.tensor([[False, True, True, False]]).repeat(len(rewards), 1)
    return AdvantageInputs(torch.tensor(rewards, dtype=dtype), torch.tensor(groups), mask_BS)


def _per_rollout(advantages: Advantages) -> torch.Tensor:
    return advantages.advantages_BS[:, 1]


@pytest.mark.parametrize("norm_by_std", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(5))
def test_grpo_equals_the_reference(seed: int, shape: tuple[int, int, int], norm_by_std: bool) -> None:
    inputs = _random_inputs(seed, *shape)
    result = grpo(inputs, AdvantageSettings(norm_by_std=norm_by_std)).advantages_BS
    columns = (inputs.rewards_B.numpy(), inputs.group_B.numpy(), inputs.mask_BS.numpy())
    expected = reference.grpo(*columns, norm_by_std, epsilon=1e-6)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(5))
def test_rloo_equals_the_reference(seed: int, shape: tuple[int, int, int]) -> None:
    inputs = _random_inputs(seed, *shape)
    expected = reference.rloo(inputs.rewards_B.numpy(), inputs.group_B.numpy(), inputs.mask_BS.numpy())
    np.testing.assert_allclose(rloo(inputs, SETTINGS).advantages_BS.numpy(), expected, rtol=1e-10, atol=1e-10)


def _expected(name: str, rewards: Floats, groups: Ints, mask: Bools, norm_by_std: bool) -> Floats:
    match name:
        case "grpo_passk":
            return numpy_advantage.grpo_passk(rewards, groups, mask, norm_by_std, epsilon=1e-6)
        case _:
            return {
                "opo": numpy_advantage.opo,
                "gpg": numpy_advantage.gpg,
                "reinforce_plus_plus_baseline": numpy_advantage.reinforce_plus_plus_baseline,
            }[name](rewards, groups, mask)


@pytest.mark.parametrize("name", ["opo", "gpg", "grpo_passk", "reinforce_plus_plus_baseline"])
@pytest.mark.parametrize("norm_by_std", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(4))
def test_the_other_group_estimators_equal_the_reference(
    seed: int, shape: tuple[int, int, int], norm_by_std: bool, name: str
) -> None:
    inputs = _random_inputs(seed, *shape)
    result = estimators.get(name)(inputs, AdvantageSettings(norm_by_std=norm_by_std)).advantages_BS
    columns = (inputs.rewards_B.numpy(), inputs.group_B.numpy(), inputs.mask_BS.numpy())
    expected = _expected(name, *columns, norm_by_std)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-10, atol=1e-10)


def test_opo_weighs_the_baseline_by_length() -> None:
    inputs = _inputs([1.0, 0.0], [0, 0])
    inputs.mask_BS[0] = torch.tensor([True, True, True, False])
    inputs.mask_BS[1] = torch.tensor([False, True, False, False])
    assert _per_rollout(estimators.get("opo")(inputs, SETTINGS)).tolist() == pytest.approx([0.25, -0.75])


def test_gpg_makes_up_for_groups_without_spread() -> None:
    inputs = _inputs([1.0, 0.0, 1.0, 1.0, 0.0, 0.0], [0, 0, 1, 1, 2, 2])
    assert _per_rollout(estimators.get("gpg")(inputs, SETTINGS)).tolist() == [1.5, -1.5, 0.0, 0.0, 0.0, 0.0]


def _with_components(seed: int, shape: tuple[int, int, int], num_components: int) -> AdvantageInputs:
    """Return random inputs whose reward has parts: of different scales, some of them equal in a whole group."""
    inputs, rng = _random_inputs(seed, *shape), np.random.default_rng(seed + 1)
    components = rng.choice([0.0, 1.0, -0.5], (len(inputs.rewards_B), num_components)) * 10.0 ** np.arange(
        num_components
    )
    components[inputs.group_B.numpy() == inputs.group_B.numpy()[0], 0] = 0.25
    return replace(inputs, components_BK=torch.from_numpy(components))


@pytest.mark.parametrize("weights", [None, (1.0, 0.25, 3.0)])
@pytest.mark.parametrize("norm_by_std", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_gdpo_equals_the_reference(
    seed: int, shape: tuple[int, int, int], norm_by_std: bool, weights: tuple[float, ...] | None
) -> None:
    inputs = _with_components(seed, shape, 3)
    assert inputs.components_BK is not None
    chosen = AdvantageSettings(norm_by_std=norm_by_std, component_weights=weights)
    expected = numpy_advantage.gdpo(
        inputs.components_BK.numpy(),
        inputs.group_B.numpy(),
        inputs.mask_BS.numpy(),
        list(weights or (1.0, 1.0, 1.0)),
        norm_by_std,
        epsilon=1e-6,
    )
    np.testing.assert_allclose(gdpo(inputs, chosen).advantages_BS.numpy(), expected, rtol=1e-13, atol=1e-13)


def test_gdpo_tells_apart_what_grpo_of_the_sum_does_not() -> None:
    """The paper's example: in one group a rollout is ahead in one part of its reward, in the other in both."""
    one_part, both_parts = [[1.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [0.0, 0.0]]
    sums = _inputs([1.0, 0.0, 2.0, 0.0], [0, 0, 1, 1])
    inputs = replace(sums, components_BK=torch.tensor(one_part + both_parts, dtype=torch.float64))
    exact = AdvantageSettings(epsilon=1e-12)
    grpo_B, gdpo_B = (_per_rollout(estimate(inputs, exact)) for estimate in (grpo, gdpo))
    half = 0.5**0.5
    assert grpo_B.tolist() == pytest.approx([half, -half, half, -half])
    # Sums of normalised parts: +-half where one part differs, +-2 half where both do; their unbiased std over the
    # four rollouts is sqrt((0.5 + 0.5 + 2 + 2) / 3).
    std = (5 / 3) ** 0.5
    assert gdpo_B.tolist() == pytest.approx([half / std, -half / std, 2 * half / std, -2 * half / std])


def test_the_scale_of_a_component_does_not_count_and_its_weight_does() -> None:
    inputs = _with_components(3, (4, 4, 5), 2)
    assert inputs.components_BK is not None
    scaled = replace(inputs, components_BK=inputs.components_BK * torch.tensor([1e3, 1.0]))
    exact = AdvantageSettings(epsilon=1e-12)
    plain_BS = gdpo(inputs, exact).advantages_BS
    torch.testing.assert_close(gdpo(scaled, exact).advantages_BS, plain_BS, rtol=1e-9, atol=1e-9)
    weighted = replace(exact, component_weights=(2.0, 1.0))
    assert not torch.allclose(gdpo(inputs, weighted).advantages_BS, plain_BS)
    alone = replace(inputs, components_BK=inputs.components_BK[:, :1])
    for factor in (1.0, 5.0):  # of one component alone the weight cancels
        torch.testing.assert_close(
            gdpo(alone, replace(exact, component_weights=(factor,))).advantages_BS, gdpo(alone, exact).advantages_BS
        )


def test_components_without_spread_in_any_group_give_exactly_zero() -> None:
    inputs = replace(
        _inputs([1.0, 0.0, 1.0, 0.0], [0, 0, 1, 1]), components_BK=torch.tensor([[0.1], [0.1], [7.3], [7.3]])
    )
    assert not gdpo(inputs, SETTINGS).advantages_BS.any()


def test_grpo_passk_credits_the_single_best_alone() -> None:
    inputs = _inputs([0.0, 3.0, 1.0, 2.0, 2.0, 0.0], [0, 0, 0, 1, 1, 1])
    advantages = grpo_passk(inputs, AdvantageSettings(norm_by_std=False))
    assert _per_rollout(advantages).tolist() == [0.0, 2.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", GROUP_ESTIMATORS)
def test_kl_in_the_reward_counts_in_the_outcome(name: str) -> None:
    plain = _random_inputs(7, num_groups=4, group_size=4, length=5)
    kl_BS = torch.rand(plain.mask_BS.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    token_rewards_BS = penalize_rewards(plain.rewards_B, kl_BS, plain.mask_BS, coef=0.3)
    sums_B = plain.rewards_B - 0.3 * (kl_BS * plain.mask_BS).sum(-1)
    as_scores = AdvantageInputs(sums_B, plain.group_B, plain.mask_BS)
    as_tokens = AdvantageInputs(plain.rewards_B, plain.group_B, plain.mask_BS, token_rewards_BS)
    estimate = estimators.get(name)
    torch.testing.assert_close(
        estimate(as_tokens, SETTINGS).advantages_BS, estimate(as_scores, SETTINGS).advantages_BS, rtol=1e-9, atol=1e-9
    )


def test_grpo_of_a_hand_computed_group() -> None:
    one_right_of_four = _inputs([1.0, 0.0, 0.0, 0.0], [5, 5, 5, 5])
    assert _per_rollout(grpo(one_right_of_four, AdvantageSettings(epsilon=0.0))).tolist() == [1.5, -0.5, -0.5, -0.5]
    no_std = AdvantageSettings(norm_by_std=False)
    assert _per_rollout(grpo(one_right_of_four, no_std)).tolist() == [0.75, -0.25, -0.25, -0.25]


def test_rloo_of_a_hand_computed_group() -> None:
    inputs = _inputs([1.0, 0.0, 0.5], [0, 0, 0])
    assert _per_rollout(rloo(inputs, SETTINGS)).tolist() == pytest.approx([0.75, -0.75, 0.0])


@pytest.mark.parametrize("name", [name for name in GROUP_ESTIMATORS if name != "reinforce_plus_plus_baseline"])
@pytest.mark.parametrize("reward", [0.1, -1 / 3, 1e8 + 0.1, 1e-30, 0.0])
@pytest.mark.parametrize("group_size", [1, 2, 3, 7, 10])
def test_a_group_of_equal_rewards_gives_exactly_zero(name: str, reward: float, group_size: int) -> None:
    inputs = _inputs([reward] * group_size + [0.0, 1.0], [4] * group_size + [9, 9])
    advantages_B = _per_rollout(estimators.get(name)(inputs, SETTINGS))
    assert torch.equal(advantages_B[:group_size], torch.zeros(group_size, dtype=torch.float64))
    assert (advantages_B[group_size:] != 0).any()


@pytest.mark.parametrize("name", GROUP_ESTIMATORS)
def test_a_large_offset_of_all_rewards_changes_nothing(name: str) -> None:
    small = _inputs([0.0, 1.0, 1.0, 0.5], [0, 0, 0, 0])
    large = _inputs([1e9, 1e9 + 1.0, 1e9 + 1.0, 1e9 + 0.5], [0, 0, 0, 0])
    estimate = estimators.get(name)
    assert torch.equal(estimate(large, SETTINGS).advantages_BS, estimate(small, SETTINGS).advantages_BS)


@pytest.mark.parametrize("name", ["grpo", "rloo", "opo", "gpg", "grpo_passk"])
def test_advantages_are_zero_outside_the_mask_even_where_a_reward_is_nan(name: str) -> None:
    inputs = _inputs([float("nan"), 1.0, 0.0, 1.0], [0, 0, 1, 1], torch.float32)
    advantages_BS = estimators.get(name)(inputs, SETTINGS).advantages_BS
    assert advantages_BS.dtype == torch.float32
    assert torch.equal(advantages_BS[~inputs.mask_BS], torch.zeros(8))
    assert advantages_BS[:2, 1].isnan().all(), "a NaN reward must show, not turn into a number"
    assert advantages_BS[2:].isfinite().all(), "and must stay in its group"


@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_a_rollout_without_masked_tokens_still_counts_in_its_group(name: str) -> None:
    inputs = _inputs([1.0, 0.0, 0.0], [0, 0, 0])
    inputs.mask_BS[0] = False
    advantages_BS = estimators.get(name)(inputs, SETTINGS).advantages_BS
    assert (advantages_BS[0] == 0).all()
    assert (advantages_BS[1:, 1] < 0).all()


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), name=st.sampled_from(GROUP_ESTIMATORS))
def test_the_order_of_the_rows_does_not_matter(seed: int, name: str) -> None:
    inputs = _random_inputs(seed, num_groups=4, group_size=3, length=3)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(12))
    permuted = AdvantageInputs(inputs.rewards_B[order], inputs.group_B[order], inputs.mask_BS[order])
    estimate = estimators.get(name)
    expected = estimate(inputs, SETTINGS).advantages_BS[order]
    torch.testing.assert_close(estimate(permuted, SETTINGS).advantages_BS, expected, rtol=1e-12, atol=1e-12)


@settings(deadline=None)
@given(rewards=st.lists(st.floats(-100, 100), min_size=2, max_size=9))
def test_the_advantages_of_a_group_sum_to_zero(rewards: list[float]) -> None:
    inputs = _inputs(rewards, [3] * len(rewards))
    for estimate in (grpo, rloo):
        assert _per_rollout(estimate(inputs, SETTINGS)).sum().item() == pytest.approx(0.0, abs=1e-9)
