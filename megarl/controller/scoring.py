"""The rewards of rollouts: a function's, a model's, and the penalty of overlong responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from megarl.algorithm.filters import overlong_penalty
from megarl.algorithm.samples import Rewards
from megarl.batching.pack import rollouts_to_batch
from megarl.config.schema import RewardConfig
from megarl.controller.early_scores import EarlyScores
from megarl.controller.observer import Observer
from megarl.controller.reward_log import RewardLog
from megarl.controller.role_on_ranks import RoleOnRanks
from megarl.errors import RewardError
from megarl.monitor.console import RolloutRow
from megarl.reward.pool import RewardPool
from megarl.types import Group, Prompt, RewardRequest, RewardResult, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Scorer:
    """Scores rollouts. pool: None where only a model scores. model: None where only a function does.

    max_response_tokens: of the longest response that can be. log: takes what went wrong with the function.
    component_names: of the parts of the function's reward that the estimator reads. early: scores by the function what
    has ended before a whole batch has.
    """

    config: RewardConfig
    tokenizer: PreTrainedTokenizerBase
    max_response_tokens: int
    pool: RewardPool | None
    model: RoleOnRanks | None
    observer: Observer
    log: RewardLog
    component_names: tuple[str, ...] = ()
    early: EarlyScores | None = None

    def begin(self, prompt: Prompt, rollout: Rollout) -> None:
        """Have the function score a rollout of a batch that isn't complete, where rollouts are scored early."""
        if self.early is not None:
            self.early.begin(rollout, lambda: self._requests([prompt], [(rollout,)])[0])

    def score(self, prompts: Sequence[Prompt], groups: Sequence[Group], is_part: bool = False) -> Rewards:
        """Return the rewards of all rollouts, in order, with the penalty of overlong ones where configured.

        is_part: others of the same step are scored beside these. Raises RewardError where the function fails on all,
        unless they are a part or the config says to go on, and where a sum of rewards is no finite float32.
        """
        buffer, penalties_B = self.config.overlong_buffer, torch.zeros(sum(map(len, groups)))
        if buffer.enable:
            lengths_B = torch.tensor([len(r.token_ids) for group in groups for r in group])
            penalties_B = overlong_penalty(lengths_B, self.max_response_tokens, buffer.len, buffer.penalty_factor)
        results = () if self.pool is None else self._results(self.pool, prompts, groups, is_part)
        model_B = None
        if self.model is not None:
            model_B = self.model.scores(rollouts_to_batch([p.token_ids for p in prompts], groups))
        rewards = Rewards(results, penalties_B, model_B, self.config.model.coef, self.component_names)
        if not rewards.scores_B.isfinite().all():
            raise RewardError(
                "a reward is no finite number in float32 once the function's, reward.model.coef x the model's and the "
                f"penalty of length are added: its parts reach {max(map(abs, rewards.unpenalized)):g} and "
                f"{float(penalties_B.min()):g}. fix: scale them down"
            )
        self.observer.scored(prompts, groups, rewards)
        return rewards

    def rows(
        self, prompts: Sequence[Prompt], groups: Sequence[Group], rewards: Rewards, count: int
    ) -> tuple[RolloutRow, ...]:
        """Return the first rollout of ``count`` prompts as table rows, decoding no more than those."""
        texts = self._texts([group[:1] for group in groups[:count]])
        firsts = [sum(map(len, groups[:i])) for i in range(len(texts))]
        scores = rewards.unpenalized
        return tuple(
            RolloutRow(prompt.text, text, prompt.ground_truth, scores[first])
            for prompt, text, first in zip(prompts, texts, firsts, strict=False)
        )

    def _results(
        self, pool: RewardPool, prompts: Sequence[Prompt], groups: Sequence[Group], is_part: bool
    ) -> tuple[RewardResult, ...]:
        """Return the function's results, and log what failed."""
        origins = [p.origin for p, group in zip(prompts, groups, strict=True) for _ in group]
        requests = self._requests(prompts, groups)
        if self.early is None:
            results = tuple(pool.score(requests, self.log.tell))
        else:
            rollouts = [rollout for group in groups for rollout in group]
            results = tuple(self.early.score(rollouts, requests, self.log.tell))
        self.log.note(origins, results, pool.take_printed())
        have_all_failed = bool(results) and all(result.outcome != "ok" for result in results)
        if have_all_failed and not is_part and self.config.on_all_failed == "stop":
            raise RewardError(
                f"the reward function failed on all {len(results)} rollouts of a step. the first, {origins[0]}: "
                f"{results[0].outcome}: {results[0].detail}\n{results[0].traceback}\n"
                f"all kinds of failure: {self.log.path}\n"
                "fix the function, or go on with reward.score_on_failure by reward.on_all_failed=continue"
            )
        return results

    def _requests(self, prompts: Sequence[Prompt], groups: Sequence[Group]) -> list[RewardRequest]:
        texts = iter(self._texts(groups))
        return [
            RewardRequest(
                p.data_source, p.text, next(texts), p.ground_truth, {**p.extra_info, "finish_reason": r.finish_reason}
            )
            for p, group in zip(prompts, groups, strict=True)
            for r in group
        ]

    def _texts(self, groups: Sequence[Group]) -> list[str]:
        """Return all responses as text, in order."""
        ids = [list(rollout.token_ids) for group in groups for rollout in group]
        texts: list[str] = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return texts
