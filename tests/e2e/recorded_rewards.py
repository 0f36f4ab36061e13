"""main_ppo that also records every rollout that is scored, with its reward, as JSON in the file RECORDED_TO."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megarl.main_ppo import main
from megarl.types import Prompt, Rollout

RECORDED_TO = "MEGARL_TEST_RECORDED_TO"


def record_rewards() -> list[dict[str, Any]]:
    """Make ``Run.score`` note what it answers; return the list that is filled."""
    from megarl.controller.report import Rewards
    from megarl.controller.run import Run

    score, record = Run.score, []

    def recorded(self: Run, prompts: Sequence[Prompt], groups: Sequence[tuple[Rollout, ...]]) -> Rewards:
        rewards = score(self, prompts, groups)
        record.append(
            {
                "tokens": [
                    [*p.token_ids, *r.token_ids] for p, group in zip(prompts, groups, strict=True) for r in group
                ],
                "scores": rewards.scores_B.tolist(),
                "of_function": [result.score for result in rewards.results],
            }
        )
        return rewards

    Run.score = recorded  # type: ignore[method-assign]
    return record


if __name__ == "__main__":
    if os.environ["RANK"] == "0":
        recorded = record_rewards()
        main()
        Path(os.environ[RECORDED_TO]).write_text(json.dumps(recorded))
    else:
        main()
