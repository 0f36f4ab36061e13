"""Which tokens of a step clip_cov and kl_cov treat apart: those whose update would cost the most entropy.

The choice compares all tokens of a step, so it is made once, before the update, from what is known then: the
log-probs by the actor before its update, and the advantages. Micro-batches, mini-batches, epochs and data-parallel
ranks all see the same tokens. (Made inside of a micro-batch, as the authors' code does, it would depend on the split.)

Shape suffixes: B rollouts, S sequence, N masked tokens.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from megarl.algorithm.policy_loss import PolicyLossSettings
from megarl.algorithm.registry import Registry


class TokenSelector(Protocol):
    """The signature of every selector: masked tokens' covariances [N] to whether each is chosen, bool [N]."""

    def __call__(self, covariance_N: Tensor, settings: PolicyLossSettings, generator: torch.Generator) -> Tensor: ...


token_selectors: Registry[TokenSelector] = Registry("actor_rollout_ref.actor.policy_loss")


def select_tokens(
    policy_loss: str,
    old_logprobs_BS: Tensor,
    advantages_BS: Tensor,
    mask_BS: Tensor,
    settings: PolicyLossSettings,
    seed: int,
) -> Tensor | None:
    """Return the tokens of a step that the loss called ``policy_loss`` treats apart, bool [B, S]; None if it has none.

    seed: of random choices.
    """
    if policy_loss not in token_selectors.names():
        return None
    covariance_N = _covariance(old_logprobs_BS[mask_BS].double(), advantages_BS[mask_BS].double()).cpu()
    chosen_N = token_selectors.get(policy_loss)(covariance_N, settings, torch.Generator().manual_seed(seed))
    chosen_BS = torch.zeros_like(mask_BS)
    chosen_BS[mask_BS] = chosen_N.to(mask_BS.device)
    return chosen_BS


@token_selectors.register("clip_cov")
def uniformly_in_band(covariance_N: Tensor, settings: PolicyLossSettings, generator: torch.Generator) -> Tensor:
    """Choose floor(cov_share * N) tokens, at least 1, evenly among those with cov_low < covariance < cov_high.

    All of these where they are fewer. The entropy mechanism, arXiv:2505.22617, section 4.2 (Clip-Cov).
    """
    candidates = ((covariance_N > settings.cov_low) & (covariance_N < settings.cov_high)).nonzero()[:, 0]
    order = torch.randperm(len(candidates), generator=generator)
    return _at(candidates[order[: _quota(covariance_N, settings)]], covariance_N)


@token_selectors.register("kl_cov")
def largest(covariance_N: Tensor, settings: PolicyLossSettings, generator: torch.Generator) -> Tensor:
    """Choose the floor(cov_share * N) tokens, at least 1, of the largest covariance; of equal ones the first.

    The entropy mechanism, arXiv:2505.22617, section 4.2 (KL-Cov).
    """
    order = covariance_N.argsort(descending=True, stable=True)
    return _at(order[: _quota(covariance_N, settings)], covariance_N)


def _covariance(logprobs_N: Tensor, advantages_N: Tensor) -> Tensor:
    """Return each token's share of the covariance: (logprob - mean(logprob)) * (A - mean(A))."""
    return (logprobs_N - logprobs_N.mean()) * (advantages_N - advantages_N.mean())


def _quota(covariance_N: Tensor, settings: PolicyLossSettings) -> int:
    return max(int(settings.cov_share * len(covariance_N)), 1)


def _at(index: Tensor, like_N: Tensor) -> Tensor:
    chosen_N = torch.zeros_like(like_N, dtype=torch.bool)
    chosen_N[index] = True
    return chosen_N
