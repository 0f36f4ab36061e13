"""main_ppo that also records what every replica answers to each greedy request, as JSON in the file RECORDED_TO."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megarl.config.compose import run_hydra
from megarl.controller.observer import Observer
from megarl.launchers.group import WorkerGroup
from megarl.main_ppo import main, run_ppo
from megarl.types import GenerationRequest, Group, Sampling

RECORDED_TO = "MEGARL_TEST_RECORDED_TO"


class GreedyAnswers(Observer):
    """Asks all replicas everything that is greedy; engines in processes of their own are asked once, by the run."""

    def __init__(self, is_served: bool) -> None:
        self.is_served = is_served
        self.record: list[dict[str, Any]] = []

    def opened(self, group: WorkerGroup) -> None:
        """Take note of the ranks."""
        self.group = group

    def generated(self, requests: Sequence[GenerationRequest], sampling: Sampling, groups: Sequence[Group]) -> None:
        """Ask every replica for the answers to greedy requests."""
        from megarl.launchers.group import everywhere
        from megarl.ranks.work import GenerateWork
        from megarl.ranks.worker import Worker

        if sampling.temperature != 0:
            return
        answers: list[Any] = [groups]
        if not self.is_served:
            answers = everywhere(self.group, Worker.generate, GenerateWork(tuple(requests), sampling))
        told = [answer for answer in answers if answer is not None]
        self.record.append(
            {
                "prompts": [request.token_ids for request in requests],
                "max_tokens": sampling.max_tokens,
                "versions": sorted({r.policy_version for replica in told for (r,) in replica}),
                "answers_by_replica": [[r.token_ids for (r,) in replica] for replica in told],
                "logprobs_by_replica": [[r.logprobs for (r,) in replica] for replica in told],
            }
        )


if __name__ == "__main__":
    if os.environ["RANK"] == "0":
        observer = GreedyAnswers(is_served=any("placement=server" in argument for argument in sys.argv))
        run_hydra("ppo_trainer", lambda values, overrides: run_ppo(values, overrides, observer))
        Path(os.environ[RECORDED_TO]).write_text(json.dumps(observer.record))
    else:
        main()
