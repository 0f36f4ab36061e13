"""The rollouts of a step with their rewards.

Shape suffixes: B rollouts, K components of a reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megarl.algorithm.filters import in_group_with_spread
from megarl.types import Group, Metrics, Prompt, RewardResult, RolloutBatch


@dataclass(frozen=True)
class Rewards:
    """The rewards of a step, in the order of its rollouts.

    results: of the reward function, none where there is no function. penalties_B: added for overlong responses, at most
    0. model_B: the reward model's scores, None without one; ``model_coef`` times they are added to the function's.
    component_names: of the parts of the function's reward that the estimator reads.
    """

    results: tuple[RewardResult, ...]
    penalties_B: Tensor
    model_B: Tensor | None = None
    model_coef: float = 1.0
    component_names: tuple[str, ...] = ()

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

    @property
    def components_BK(self) -> Tensor | None:
        """Parts of the rewards by name, float32 [B, K]; None where the estimator reads none."""
        return torch.tensor([r.components for r in self.results]) if self.component_names else None

    @property
    def component_means(self) -> Metrics:
        """The mean of every component by its name."""
        columns_BK = self.components_BK
        means = [] if columns_BK is None else columns_BK.double().mean(0).tolist()
        return dict(zip(self.component_names, means, strict=True)) if means else {}

    def has_spread(self, group_B: Tensor) -> Tensor:
        """Return for each rollout whether its group teaches: it has two scores, or two values of a part; bool [B].

        The penalty of overlong responses is no part of it: it would tell apart what is equally right.
        """
        columns_BK = self.components_BK
        if columns_BK is None:
            return in_group_with_spread(torch.tensor(self.unpenalized), group_B)
        return torch.stack([in_group_with_spread(column_B, group_B) for column_B in columns_BK.T]).any(0)

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
        return replace(self, results=tuple(results), penalties_B=penalties_B, model_B=model_B)

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
        """Return the mean of every component; of the model's scores as they are, and of the function's beside them."""
        parts = {f"reward/component/{name}": mean for name, mean in self.component_means.items()}
        if self.model_B is None:
            return parts
        parts["reward/model_mean"] = float(self.model_B.mean())
        if self.results:
            parts["reward/function_mean"] = sum(r.score for r in self.results) / len(self.results)
        return parts


@dataclass(frozen=True)
class Samples:
    """The rollouts of a step, group after group.

    batch: the same as sequences, with what the engine knows of them. baseline_B: for every rollout the reward of its
    prompt's greedy one, None where the estimator wants none. current_version: of the weights that train on them, None
    where these sampled them.
    """

    prompts: tuple[Prompt, ...]
    groups: tuple[Group, ...]
    rewards: Rewards
    batch: RolloutBatch
    baseline_B: Tensor | None = None
    current_version: int | None = None

    @property
    def is_cut_B(self) -> Tensor:
        """Whether each response ended at the limit of its length; bool [B]."""
        return torch.tensor([r.finish_reason == "length" for group in self.groups for r in group])
