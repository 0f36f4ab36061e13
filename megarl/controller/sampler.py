"""Where the rollouts of a step come from: the next prompts, the engine, the rewards, and dynamic sampling."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch

from megarl.algorithm.samples import Rewards, Samples
from megarl.algorithm.seeds import seed_of
from megarl.batching.pack import rollouts_to_batch
from megarl.controller.engines import Ended, Engines
from megarl.controller.scoring import Scorer
from megarl.data.mixing import MixedOrder
from megarl.data.order import Order
from megarl.monitor.console import RolloutRow
from megarl.monitor.timing import Stopwatch
from megarl.types import GenerationRequest, Group, Prompt, Sampling


@dataclass
class RolloutSampler:
    """Generates the rollouts of a step when they are asked for.

    sampling: with a greedy rollout for each prompt where the estimator compares with it. max_generations: of a step, to
    replace groups whose rewards are all equal; 1 replaces none. num_rows: prompts for people to read.
    """

    prompts: tuple[Prompt, ...]
    order: Order | MixedOrder
    engine: Engines
    scorer: Scorer
    sampling: Sampling
    seed: int
    max_generations: int
    num_rows: int
    stopwatch: Stopwatch
    _taken: tuple[Sequence[Prompt], Sequence[Group], Rewards] | None = None

    def take(self, step: int) -> Samples:
        """Return the rollouts of a step, counted from 1, with their rewards."""
        return self.samples(step, self._generated(self.requests(step), self.prompts_of(step)))

    def requests(self, step: int) -> list[GenerationRequest]:
        """Return the requests of a step. Their seeds follow from the run's, the step and the place in the batch."""
        prompts = self.prompts_of(step)
        return self._requests(prompts, step, 0, range(len(prompts)))

    def scoring_of(self, prompts: Sequence[Prompt]) -> Ended:
        """Return the Ended that begins the scoring of each rollout of prompts."""
        return lambda place, rollout: self.scorer.begin(prompts[place], rollout)

    def samples(self, step: int, groups: Sequence[Group], prompts: Sequence[Prompt] | None = None) -> Samples:
        """Return the rollouts of what was asked for a step with their rewards, after dynamic sampling.

        prompts: of the groups, where they aren't those of the step.
        """
        prompts = self.prompts_of(step) if prompts is None else prompts
        groups, greedy = self._apart(groups)
        with self.stopwatch.timed("score"):
            rewards, baseline_B = self.scorer.score(prompts, groups), None
            if self.sampling.with_greedy:
                baseline_B = self.scorer.score(prompts, greedy, is_part=True).scores_B.repeat_interleave(
                    self.sampling.n
                )
        if self.max_generations > 1:
            with self.stopwatch.timed("resample"):
                prompts, groups, rewards = self._with_spread(step, prompts, groups, rewards)
        self._taken = (prompts, groups, rewards)
        batch = rollouts_to_batch([p.token_ids for p in prompts], groups)
        return Samples(tuple(prompts), tuple(groups), rewards, batch, baseline_B)

    def paused(self) -> AbstractContextManager[None]:
        """Have no sampling go on for the duration: none does between two calls of ``take``."""
        return nullcontext()

    def sampled_rows(self) -> tuple[RolloutRow, ...]:
        """Return the first rollout of some of the prompts that were taken last."""
        return () if self._taken is None else self.scorer.rows(*self._taken, self.num_rows)

    def every_row(self) -> tuple[RolloutRow, ...]:
        """Return all rollouts that were taken last."""
        if self._taken is None:
            return ()
        prompts, groups, rewards = self._taken
        alone = [(prompt, (rollout,)) for prompt, group in zip(prompts, groups, strict=True) for rollout in group]
        return self.scorer.rows([p for p, _ in alone], [g for _, g in alone], rewards, len(alone))

    def prompts_of(self, step: int) -> list[Prompt]:
        """Return the prompts of a step, counted from 1."""
        return [self.prompts[i] for i in self.order.batch(step - 1)]

    def _requests(
        self, prompts: Sequence[Prompt], step: int, attempt: int, places: Sequence[int]
    ) -> list[GenerationRequest]:
        """Return the requests of prompts.

        places: of the prompts in the batch; a seed follows from them, so a prompt that comes twice is answered twice.
        """
        return [
            GenerationRequest(prompt.token_ids, seed_of(self.seed, "train", step, attempt, place))
            for prompt, place in zip(prompts, places, strict=True)
        ]

    def _generated(self, requests: Sequence[GenerationRequest], prompts: Sequence[Prompt]) -> list[Group]:
        with self.stopwatch.timed("generate"):
            groups = self.engine.generate(requests, self.sampling, self.scoring_of(prompts))
            self.engine.rest()
        return groups

    def _apart(self, groups: Sequence[Group]) -> tuple[list[Group], list[Group]]:
        """Return the rollouts of each prompt for training, and of each a greedy one if the estimator wants it."""
        n = self.sampling.n
        return [g[:n] for g in groups], [g[n:] for g in groups] if self.sampling.with_greedy else []

    def _with_spread(
        self, step: int, prompts: Sequence[Prompt], groups: Sequence[Group], rewards: Rewards
    ) -> tuple[list[Prompt], list[Group], Rewards]:
        """Put fresh prompts in the place of groups whose rewards are all equal, as often as configured (DAPO).

        The replacements follow from the step alone, so a resumed run draws the same. A group without spread after the
        last generation stays.
        """
        prompts, groups, n = list(prompts), list(groups), self.sampling.n
        for attempt in range(1, self.max_generations):
            group_B = torch.arange(len(groups)).repeat_interleave(n)
            dull = (~rewards.has_spread(group_B))[::n].nonzero()[:, 0].tolist()
            if not dull:
                break
            order = replace(self.order, shuffle=True, seed=seed_of(self.seed, "resample", attempt))
            fresh = [self.prompts[i] for i in order.batch(step - 1)[: len(dull)]]
            fresh_groups, _ = self._apart(self._generated(self._requests(fresh, step, attempt, dull), fresh))
            fresh_rewards = self.scorer.score(fresh, fresh_groups, is_part=True)
            for place, prompt, group in zip(dull, fresh, fresh_groups, strict=True):
                prompts[place], groups[place] = prompt, group
            rewards = rewards.with_groups(dull, fresh_rewards, n)
        return prompts, groups, rewards
