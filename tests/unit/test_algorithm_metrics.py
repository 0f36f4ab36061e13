from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megarl.algorithm.metrics import logprob_difference, masked_mean
from tests.unit import numpy_reference as reference


@pytest.mark.parametrize("seed", range(5))
def test_logprob_difference_equals_the_reference(seed: int) -> None:
    rng = np.random.default_rng(seed)
    train, rollout = -rng.random((6, 9)), -rng.random((6, 9))
    mask = rng.random((6, 9)) < 0.4
    mask[2] = False
    result = logprob_difference(torch.from_numpy(train), torch.from_numpy(rollout), torch.from_numpy(mask))
    expected = reference.logprob_difference(train, rollout, mask)
    assert (result.mean_abs, result.max_abs, result.kl) == pytest.approx(expected, rel=1e-10, abs=1e-10)
    assert result.num_tokens == mask.sum()


def test_what_lies_outside_the_mask_is_not_compared() -> None:
    train_BS, rollout_BS = torch.tensor([[9.0, -1.0, 7.0]]), torch.tensor([[0.0, -1.5, 0.0]])
    result = logprob_difference(train_BS, rollout_BS, torch.tensor([[False, True, False]]))
    assert (result.mean_abs, result.max_abs, result.kl, result.num_tokens) == (0.5, 0.5, -0.5, 1)


def test_a_token_that_one_side_rules_out_shows_as_infinite() -> None:
    rollout_BS = torch.tensor([[-1.0, -math.inf]])
    result = logprob_difference(torch.tensor([[-1.0, -1.0]]), rollout_BS, torch.ones(1, 2, dtype=torch.bool))
    assert result.max_abs == math.inf


def test_no_masked_token_gives_zeros_and_says_so() -> None:
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    result = logprob_difference(torch.ones(2, 3), torch.zeros(2, 3), nothing)
    assert (result.mean_abs, result.max_abs, result.kl, result.num_tokens) == (0.0, 0.0, 0.0, 0)
    assert masked_mean(torch.ones(2, 3), nothing) == 0.0


def test_masked_mean_averages_masked_tokens_only() -> None:
    assert masked_mean(torch.tensor([[1.0, 5.0], [3.0, 9.0]]), torch.tensor([[True, False], [True, False]])) == 2.0
