from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megarl.algorithm.advantage import AdvantageInputs, AdvantageSettings, estimators
from megarl.algorithm.filters import in_group_with_spread, overlong_penalty


def test_groups_of_equal_rewards_and_of_one_have_no_spread() -> None:
    rewards_B = torch.tensor([1.0, 0.1, 0.0, 1.0, 0.1, 0.1, 7.0])
    group_B = torch.tensor([5, -2, 5, 5, -2, -2, 9])
    expected = [True, False, True, True, False, False, False]
    assert in_group_with_spread(rewards_B, group_B).tolist() == expected


def test_a_nan_reward_is_not_filtered_away_unseen() -> None:
    rewards_B = torch.tensor([float("nan"), 1.0, 1.0, 1.0])
    assert in_group_with_spread(rewards_B, torch.tensor([0, 0, 1, 1])).tolist() == [True, True, False, False]


@given(rewards=st.lists(st.sampled_from([0.0, 1.0, 0.1, 1 / 3]), min_size=8, max_size=8))
def test_a_group_is_left_out_exactly_where_grpo_has_no_advantage(rewards: list[float]) -> None:
    rewards_B, group_B = torch.tensor(rewards), torch.tensor([0, 1, 0, 1, 2, 2, 3, 3])
    inputs = AdvantageInputs(rewards_B, group_B, torch.ones(8, 1, dtype=torch.bool))
    advantages_B = estimators.get("grpo")(inputs, AdvantageSettings()).advantages_BS[:, 0]
    for group in range(4):
        mine = group_B == group
        assert bool(in_group_with_spread(rewards_B, group_B)[mine].all()) == bool((advantages_B[mine] != 0).any())


@pytest.mark.parametrize(
    ("num_tokens", "penalty"), [(0, 0.0), (16, 0.0), (17, -0.25), (18, -0.5), (20, -1.0), (21, -1.0), (900, -1.0)]
)
def test_the_overlong_penalty_falls_linearly_over_the_buffer(num_tokens: int, penalty: float) -> None:
    assert overlong_penalty(torch.tensor([num_tokens]), max_tokens=20, buffer_tokens=4).tolist() == [penalty]
    scaled = overlong_penalty(torch.tensor([num_tokens]), max_tokens=20, buffer_tokens=4, factor=0.5)
    assert scaled.tolist() == [penalty / 2]
