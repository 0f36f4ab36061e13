"""main_ppo that also records what every rank answers to each greedy request, as JSON in the file RECORDED_TO."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megarl.main_ppo import main
from megarl.types import GenerationRequest, Rollout, Sampling

RECORDED_TO = "MEGARL_TEST_RECORDED_TO"


def record_greedy() -> list[dict[str, Any]]:
    """Make ``Ranks.generate`` ask all replicas everything that is greedy; return the list that is filled."""
    from megarl.controller.ranks import Ranks

    generate, record = Ranks.generate, []

    def recorded(self: Ranks, requests: Sequence[GenerationRequest], sampling: Sampling) -> list[tuple[Rollout, ...]]:
        if sampling.temperature == 0:
            answers = self.group.call("generate", [(requests, sampling)] * self.group.world_size)
            record.append(
                {
                    "prompts": [request.token_ids for request in requests],
                    "max_tokens": sampling.max_tokens,
                    "versions": sorted({r.policy_version for rank in answers for (r,) in rank}),
                    "answers_by_rank": [[r.token_ids for (r,) in rank] for rank in answers],
                }
            )
        return generate(self, requests, sampling)

    Ranks.generate = recorded  # type: ignore[method-assign]
    return record


if __name__ == "__main__":
    if os.environ["RANK"] == "0":
        recorded = record_greedy()
        main()
        Path(os.environ[RECORDED_TO]).write_text(json.dumps(recorded))
    else:
        main()
