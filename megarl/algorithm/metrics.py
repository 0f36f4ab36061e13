"""Numbers about rollouts for people to watch. No gradient passes through them.

Shape suffixes: B rollouts, S sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LogprobDifference:
    """How far the trainer's log-probs are from the rollout engine's on the same tokens, in nats.

    mean_abs, max_abs: of |train - rollout|. kl: mean of rollout - train, the k1 estimate of KL(rollout || train),
    which is unbiased since the rollout engine sampled the tokens. All are 0 where num_tokens is 0.
    """

    mean_abs: float
    max_abs: float
    kl: float
    num_tokens: int


def logprob_difference(train_BS: Tensor, rollout_BS: Tensor, mask_BS: Tensor) -> LogprobDifference:
    """Compare the log-probs of both on the masked tokens. Infinities and NaN are kept, for they are the news."""
    difference_T = (rollout_BS.detach().double() - train_BS.detach().double())[mask_BS]
    if difference_T.numel() == 0:
        return LogprobDifference(mean_abs=0.0, max_abs=0.0, kl=0.0, num_tokens=0)
    absolute_T = difference_T.abs()
    return LogprobDifference(
        mean_abs=absolute_T.mean().item(),
        max_abs=absolute_T.max().item(),
        kl=difference_T.mean().item(),
        num_tokens=difference_T.numel(),
    )


def masked_mean(values_BS: Tensor, mask_BS: Tensor) -> float:
    """Return the mean over the masked tokens, 0 where there are none."""
    values_T = values_BS.detach().double()[mask_BS]
    return values_T.mean().item() if values_T.numel() else 0.0
