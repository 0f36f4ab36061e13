from __future__ import annotations

import numpy as np
import pytest
import torch

from megarl.algorithm.token_rewards import on_last_token, penalize_rewards
from tests.unit import numpy_advantage as reference


@pytest.mark.parametrize("shape", [(1, 1), (4, 1), (1, 6), (7, 5)])
@pytest.mark.parametrize("seed", range(4))
def test_penalized_rewards_equal_the_reference(seed: int, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    mask, scores, kl = rng.random(shape) < 0.6, rng.normal(size=shape[0]), rng.normal(size=shape)
    result = penalize_rewards(torch.from_numpy(scores), torch.from_numpy(kl), torch.from_numpy(mask), 0.05)
    np.testing.assert_allclose(result.numpy(), reference.penalize(scores, kl, mask, 0.05), rtol=1e-10, atol=1e-10)


def test_the_score_is_on_the_last_masked_token_even_before_a_masked_tail() -> None:
    mask_BS = torch.tensor([[False, True, False, True, False], [True, False, False, False, False], [False] * 5])
    rewards_BS = on_last_token(torch.tensor([3.0, 4.0, 5.0]), mask_BS)
    assert rewards_BS.tolist() == [[0, 0, 0, 3, 0], [4, 0, 0, 0, 0], [0, 0, 0, 0, 0]]


def test_a_penalty_outside_the_mask_is_never_read() -> None:
    kl_BS = torch.tensor([[float("nan"), 0.5, float("inf")]])
    result = penalize_rewards(torch.tensor([1.0]), kl_BS, torch.tensor([[False, True, False]]), 2.0)
    assert result.tolist() == [[0.0, 0.0, 0.0]]


def test_a_coefficient_of_zero_leaves_the_scores_alone() -> None:
    mask_BS = torch.tensor([[True, True, False]])
    result = penalize_rewards(torch.tensor([1.5]), torch.full((1, 3), 9.0), mask_BS, 0.0)
    assert torch.equal(result, on_last_token(torch.tensor([1.5]), mask_BS))
