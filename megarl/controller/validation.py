"""Validation of an RL run: sample the validation prompts and score them."""

from __future__ import annotations

from dataclasses import dataclass

from megarl.algorithm.seeds import seed_of
from megarl.controller.engines import Engines
from megarl.controller.report import Evaluation
from megarl.controller.scoring import Scorer
from megarl.types import GenerationRequest, Group, Prompt, Sampling


@dataclass(frozen=True)
class Validation:
    """Evaluates the weights that were published last. batch_size: prompts of one pass through the engine."""

    prompts: tuple[Prompt, ...]
    batch_size: int
    engine: Engines
    scorer: Scorer
    sampling: Sampling
    seed: int
    num_rows: int

    def __call__(self, step: int) -> Evaluation:
        """Return the evaluation after ``step``."""
        requests = [GenerationRequest(p.token_ids, seed_of(self.seed, "val", p.uid)) for p in self.prompts]
        groups: list[Group] = []
        for start in range(0, len(requests), self.batch_size):
            groups += self.engine.generate(requests[start : start + self.batch_size], self.sampling)
        self.engine.rest()
        rewards = self.scorer.score(self.prompts, groups)
        lengths = [len(r.token_ids) for group in groups for r in group]
        num_cut = sum(r.finish_reason == "length" for group in groups for r in group)
        mean = sum(rewards.unpenalized) / len(rewards.unpenalized)
        components = rewards.component_means
        metrics = {
            "val/reward_mean": mean,
            **{f"val/component/{name}": value for name, value in components.items()},
            "val/response_mean_tokens": sum(lengths) / len(lengths),
            "val/response_share_cut": num_cut / len(lengths),
        }
        rows = self.scorer.rows(self.prompts, groups, rewards, self.num_rows)
        return Evaluation(step, mean, f"validation reward over {len(lengths)} rollouts", metrics, rows, components)
