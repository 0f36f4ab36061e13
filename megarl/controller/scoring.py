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
from megarl.controller.observer import Observer
from megarl.controller.role_on_ranks import RoleOnRanks
from megarl.monitor.console import RolloutRow
from megarl.reward.pool import RewardPool
from megarl.types import Group, Prompt, RewardRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Scorer:
    """Scores rollouts. pool: None where only a model scores. model: None where only a function does.

    max_response_tokens: of the longest response that can be.
    """

    config: RewardConfig
    tokenizer: PreTrainedTokenizerBase
    max_response_tokens: int
    pool: RewardPool | None
    model: RoleOnRanks | None
    observer: Observer

    def score(self, prompts: Sequence[Prompt], groups: Sequence[Group]) -> Rewards:
        """Return the rewards of all rollouts, in order, with the penalty of overlong ones where configured."""
        buffer, penalties_B = self.config.overlong_buffer, torch.zeros(sum(map(len, groups)))
        if buffer.enable:
            lengths_B = torch.tensor([len(r.token_ids) for group in groups for r in group])
            penalties_B = overlong_penalty(lengths_B, self.max_response_tokens, buffer.len, buffer.penalty_factor)
        results = () if self.pool is None else tuple(self.pool.score(self._requests(prompts, groups)))
        model_B = None
        if self.model is not None:
            model_B = self.model.scores(rollouts_to_batch([p.token_ids for p in prompts], groups))
        rewards = Rewards(results, penalties_B, model_B, self.config.model.coef)
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
