"""main_ppo that also records every rollout that is scored, with its reward, as JSON in the file RECORDED_TO."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megarl.config.compose import run_hydra
from megarl.controller.observer import Observer
from megarl.main_ppo import main, run_ppo
from megarl.types import Group, Prompt

if TYPE_CHECKING:
    from megarl.algorithm.samples import Rewards

RECORDED_TO = "MEGARL_TEST_RECORDED_TO"


class ScoredRollouts(Observer):
    """Keeps the tokens and rewards of everything that is scored."""

    def __init__(self) -> None:
        self.record: list[dict[str, Any]] = []

    def scored(self, prompts: Sequence[Prompt], groups: Sequence[Group], rewards: Rewards) -> None:
        """Keep the rollouts."""
        rollouts = [(p, r) for p, group in zip(prompts, groups, strict=True) for r in group]
        self.record.append(
            {
                "tokens": [[*p.token_ids, *r.token_ids] for p, r in rollouts],
                "scores": rewards.scores_B.tolist(),
                "of_function": [result.score for result in rewards.results],
            }
        )


if __name__ == "__main__":
    if os.environ["RANK"] == "0":
        observer = ScoredRollouts()
        run_hydra("ppo_trainer", lambda values, overrides: run_ppo(values, overrides, observer))
        Path(os.environ[RECORDED_TO]).write_text(json.dumps(observer.record))
    else:
        main()
