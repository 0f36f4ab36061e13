"""The rollouts of a step with their rewards.

Shape suffixes: B rollouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megarl.types import Group, Metrics, Prompt, RewardResult, RolloutBatch


@dataclass(frozen=True)
class Rewards:
    """The rewards of a step, in the order of its rollouts.

    results: of the reward function, none where there is no function. penalties_B: added for overlong responses, at most
    0. model_B: the reward model's scores, None without one; ``model_coef`` times they are added to the function's.
    """

    results: tuple[RewardResult, ...]
    penalties_B: Tensor
    model_B: Tensor | None = None
    model_coef: float = 1.0

    @property
    def unpenalized(self) -> tuple[float, ...]:
        """Scores of function and model together, without penalties of length."""
        scores = tuple(r.score for r in self.results)
        if self.model_B is None:
            return scores
        of_model = tuple(self.model_coef * score for score in self.model_B.tolist())
        return tuple(map(sum, zip(scores, of_model, strict=True))) if scores else of_model

    @property
    def scores_B(self) -> Tensor:
        """Scores as float32 [B], penalties included."""
        return torch.tensor(self.unpenalized) + self.penalties_B

    def with_groups(self, places: Sequence[int], fresh: Rewards, n: int) -> Rewards:
        """Return these rewards with the groups of ``n`` at ``places`` taken from ``fresh``, in order."""
        results, penalties_B = list(self.results), self.penalties_B.clone()
        model_B = None if self.model_B is None else self.model_B.clone()
        for i, place in enumerate(places):
            there, here = slice(place * n, (place + 1) * n), slice(i * n, (i + 1) * n)
            results[there] = fresh.results[here]
            penalties_B[there] = fresh.penalties_B[here]
            if model_B is not None and fresh.model_B is not None:
                model_B[there] = fresh.model_B[here]
        return Rewards(tuple(results), penalties_B, model_B, self.model_coef)

    def metrics(self) -> Metrics:
        """Mean, spread, the model's part and the function's, and what went wrong."""
        scores = self.scores_B.double()  # a sum of numbers that are finite in float32 need not be
        failures = {o: sum(r.outcome == o for r in self.results) for o in ("raised", "timeout", "invalid")}
        return {
            "reward/mean": float(scores.mean()),
            "reward/std": float(scores.std(unbiased=False)),
            "reward/min": float(scores.min()),
            "reward/max": float(scores.max()),
            "reward/overlong_penalty_mean": float(self.penalties_B.mean()),
            **self._parts(),
            **{f"reward/num_{outcome}": float(count) for outcome, count in failures.items()},
        }

    def _parts(self) -> Metrics:
        """Return the mean of the model's scores as they are, and of the function's beside them."""
        if self.model_B is None:
            return {}
        parts = {"reward/model_mean": float(self.model_B.mean())}
        if self.results:
            parts["reward/function_mean"] = sum(r.score for r in self.results) / len(self.results)
        return parts


def share_cut(groups: Sequence[Group]) -> float:
    """Return the share of rollouts that were cut at the longest response, where they would have gone on."""
    cut = [rollout.finish_reason == "length" for group in groups for rollout in group]
    return sum(cut) / len(cut)


@dataclass(frozen=True)
class Samples:
    """The rollouts of a step, group after group.

    batch: the same as sequences, with what the engine knows of them. baseline_B: for every rollout the reward of its
    prompt's greedy one, None where the estimator wants none.
    """

    prompts: tuple[Prompt, ...]
    groups: tuple[Group, ...]
    rewards: Rewards
    batch: RolloutBatch
    baseline_B: Tensor | None = None
