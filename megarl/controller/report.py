"""Numbers and tables about a step: what goes to the metrics, and what a person reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megarl.algorithm.filters import in_group_with_spread
from megarl.algorithm.metrics import logprob_difference, masked_mean
from megarl.algorithm.value_loss import explained_variance
from megarl.monitor.console import RolloutRow, rollouts_table
from megarl.train.work import Metrics
from megarl.types import Batch, Prompt, RewardResult, Rollout


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
        scores = self.scores_B
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


@dataclass(frozen=True)
class Evaluation:
    """A pass over the validation prompts. rows: some of its rollouts, the same prompts each time."""

    step: int
    reward_mean: float
    response_tokens: float
    num_rollouts: int
    rows: tuple[RolloutRow, ...]

    def metrics(self) -> Metrics:
        """Return what goes to the sinks."""
        return {"val/reward_mean": self.reward_mean, "val/response_mean_tokens": self.response_tokens}


def step_metrics(batch: Batch, rewards: Rewards) -> Metrics:
    """Return the metrics of a step before its updates: rewards, lengths, groups, the engine against the trainer."""
    assert batch.old_logprobs_BS is not None and batch.rollout_logprobs_BS is not None
    assert batch.advantages_BS is not None and batch.policy_version_B is not None
    tokens_B = batch.mask_BS.sum(-1)
    difference = logprob_difference(batch.old_logprobs_BS, batch.rollout_logprobs_BS, batch.mask_BS)
    return {
        **rewards.metrics(),
        "response/mean_tokens": float(tokens_B.float().mean()),
        "response/max_tokens": float(tokens_B.max()),
        "response/total_tokens": float(tokens_B.sum()),
        "group/share_without_spread": float((~in_group_with_spread(rewards.scores_B, batch.group_B)).float().mean()),
        "advantage/mean_abs": masked_mean(batch.advantages_BS.abs(), batch.mask_BS),
        "rollout_train/logprob_diff_mean": difference.mean_abs,
        "rollout_train/logprob_diff_max": difference.max_abs,
        "rollout_train/kl": difference.kl,
        "rollout/policy_version": float(batch.policy_version_B.min()),
    }


def critic_metrics(batch: Batch, updates: Sequence[Metrics]) -> Metrics:
    """Return the metrics of a value update: values and returns before it, means over its optimizer steps."""
    assert batch.values_BS is not None and batch.returns_BS is not None
    return {
        "critic/values_mean": masked_mean(batch.values_BS, batch.mask_BS),
        "critic/returns_mean": masked_mean(batch.returns_BS, batch.mask_BS),
        "critic/explained_variance": explained_variance(batch.values_BS, batch.returns_BS, batch.mask_BS),
        **update_metrics("critic", updates),
    }


def update_metrics(role: str, updates: Sequence[Metrics]) -> Metrics:
    """Return the means over the optimizer steps of an update, by names that begin with ``role``."""
    names = sorted({name for update in updates for name in update})
    means = {f"{role}/{name}": sum(u[name] for u in updates) / len(updates) for name in names}
    return {**means, f"{role}/num_optimizer_steps": float(len(updates))}


def rollout_rows(
    prompts: Sequence[Prompt], groups: Sequence[Sequence[Rollout]], rewards: Rewards, texts: Sequence[str], count: int
) -> tuple[RolloutRow, ...]:
    """Return the first rollout of ``count`` prompts as table rows; ``texts`` are their responses in order."""
    rows, first, scores = [], 0, rewards.unpenalized
    for prompt, group in zip(prompts[:count], groups, strict=False):
        rows.append(RolloutRow(prompt.text, texts[first], prompt.ground_truth, scores[first]))
        first += len(group)
    return tuple(rows)


def final_report(before: Evaluation | None, after: Evaluation, run_dir: Path) -> str:
    """Return sampled validation rollouts and the mean reward before and after, and where the run is."""
    parts = []
    for name, evaluation in (("before", before), ("after", after)):
        if evaluation is not None and evaluation.rows:
            table = rollouts_table(evaluation.rows)
            parts.append(f"\nvalidation rollouts {name} training (step {evaluation.step})\n{table}")
    parts.append(f"\nvalidation reward over {after.num_rollouts} rollouts")
    if before is not None:
        parts.append(f"  before training: {before.reward_mean:.3f}")
    parts.append(f"  after {after.step} steps: {after.reward_mean:.3f}")
    parts.append(f"run folder: {run_dir}\nmodel: {run_dir / 'checkpoints' / 'final'}")
    return "\n".join(parts)
