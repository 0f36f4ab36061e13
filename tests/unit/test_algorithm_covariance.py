from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from megarl.algorithm.covariance import select_tokens
from megarl.algorithm.policy_loss import PolicyLossSettings, policy_losses
from tests.unit import numpy_policy_loss as reference


def _columns(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    rng, shape = np.random.default_rng(seed), (12, 20)
    mask = rng.random(shape) < 0.7
    noise = np.where(mask, 0.0, 1e3)
    logprobs, advantages = -3 * rng.random(shape) + noise, rng.normal(size=shape) - noise
    return torch.from_numpy(logprobs), torch.from_numpy(advantages), torch.from_numpy(mask)


def _expected_covariance(logprobs_BS: Tensor, advantages_BS: Tensor, mask_BS: Tensor) -> reference.Floats:
    return reference.covariance(logprobs_BS[mask_BS].numpy(), advantages_BS[mask_BS].numpy())


@pytest.mark.parametrize("share", [1e-6, 0.05, 0.5, 1.0])
def test_kl_cov_chooses_the_tokens_of_largest_covariance(share: float) -> None:
    columns = _columns(0)
    chosen_BS = select_tokens("kl_cov", *columns, PolicyLossSettings(cov_share=share), seed=0)
    assert chosen_BS is not None
    covariance = _expected_covariance(*columns)
    count = max(int(share * len(covariance)), 1)
    assert set(np.flatnonzero(chosen_BS[columns[2]].numpy())) == set(np.argsort(-covariance)[:count])
    assert not chosen_BS[~columns[2]].any()


@pytest.mark.parametrize(("share", "count"), [(1e-6, 1), (0.05, 8)])
def test_clip_cov_chooses_a_share_within_the_band(share: float, count: int) -> None:
    columns = _columns(1)
    chosen_BS = select_tokens("clip_cov", *columns, PolicyLossSettings(cov_share=share, cov_low=0.2), seed=3)
    assert chosen_BS is not None
    covariance = _expected_covariance(*columns)[chosen_BS[columns[2]].numpy()]
    assert len(covariance) == count == max(int(share * int(columns[2].sum())), 1)
    assert ((covariance > 0.2) & (covariance < 5.0)).all()


def test_clip_cov_takes_all_of_the_band_where_they_are_fewer_than_the_share() -> None:
    columns = _columns(2)
    low = float(np.sort(_expected_covariance(*columns))[-4])
    band = PolicyLossSettings(cov_share=0.5, cov_low=low, cov_high=100.0)
    chosen_BS = select_tokens("clip_cov", *columns, band, seed=0)
    assert chosen_BS is not None and int(chosen_BS.sum()) == 3


def test_clip_cov_draws_evenly_and_the_seed_decides() -> None:
    columns, band = _columns(3), PolicyLossSettings(cov_share=0.02, cov_low=0.3)
    draws = [select_tokens("clip_cov", *columns, band, seed=seed) for seed in range(400)]
    again = select_tokens("clip_cov", *columns, band, seed=5)
    assert again is not None and draws[5] is not None and torch.equal(draws[5], again)
    counts = sum(d[columns[2]].double() for d in draws if d is not None)
    covariance = _expected_covariance(*columns)
    in_band = (covariance > 0.3) & (covariance < 5.0)
    assert isinstance(counts, Tensor)
    assert not counts[torch.from_numpy(~in_band)].any()
    share = counts[torch.from_numpy(in_band)] / 400
    expected = int(0.02 * len(covariance)) / in_band.sum()
    # Five standard deviations of a binomial share.
    assert (share - expected).abs().max() < 5 * (expected * (1 - expected) / 400) ** 0.5


def test_equal_advantages_have_no_covariance_to_clip() -> None:
    logprobs_BS, _, mask_BS = _columns(4)
    chosen_BS = select_tokens("clip_cov", logprobs_BS, torch.ones(12, 20), mask_BS, PolicyLossSettings(), seed=0)
    assert chosen_BS is not None and not chosen_BS.any()


def test_losses_without_a_selector_select_nothing() -> None:
    selecting = {
        n for n in policy_losses.names() if select_tokens(n, *_columns(5), PolicyLossSettings(), 0) is not None
    }
    assert selecting == {"clip_cov", "kl_cov"}


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov"])
def test_a_step_without_tokens_selects_none(name: str) -> None:
    logprobs_BS, advantages_BS, mask_BS = _columns(6)
    nothing_BS = torch.zeros_like(mask_BS)
    chosen_BS = select_tokens(name, logprobs_BS, advantages_BS, nothing_BS, PolicyLossSettings(), seed=0)
    assert chosen_BS is not None and not chosen_BS.any()
