"""A vLLM that samples while it is asked for more: one rank of an engine in processes of its own.

Every rank of the engine schedules for itself, as in ``VllmEngine``, so that all must be told the same between the same
two steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megarl.errors import PublishError
from megarl.rollout.engine import UNPUBLISHED
from megarl.rollout.seeds import sample_seed
from megarl.rollout.served import Ask, Done, Take, samplings
from megarl.rollout.taking import WeightsTaker
from megarl.rollout.vllm import VllmEngine, rollout_of, sampling_params

if TYPE_CHECKING:
    from vllm import RequestOutput


@dataclass
class VllmStream:
    """A StreamingEngine of vLLM."""

    engine: VllmEngine
    taker: WeightsTaker

    def add(self, ask: Ask) -> None:
        """Sample the rollouts of a prompt from the next step on, as ``VllmEngine.generate`` would.

        Raises DataError for a prompt that leaves no room to answer, PublishError before the first publication.
        """
        if self.engine.policy_version == UNPUBLISHED:
            raise PublishError("an engine was asked before weights were published: its weights are random")
        self.engine.check_lengths([ask.request], ask.sampling)
        of_each, prompt = samplings(ask.sampling), {"prompt_token_ids": list(ask.request.token_ids)}
        for index in ask.indices:
            params = sampling_params(of_each[index], sample_seed(ask.request.seed, index))
            self.engine.stepped.add_request(f"{ask.number}-{index}", prompt, params)

    @property
    def is_busy(self) -> bool:
        """Whether rollouts are unfinished."""
        return bool(self.engine.stepped.has_unfinished_requests())

    def step(self) -> list[Done]:
        """Sample a token of as many rollouts as fit, and return those that have ended."""
        return [self._done(output) for output in self.engine.stepped.step() if output.finished]

    def take(self, order: Take) -> None:
        """Change the weights, and forget all that was computed with others."""
        self.taker.take(order)

    def _done(self, output: RequestOutput) -> Done:
        number, index = output.request_id.split("-")
        return Done(int(number), int(index), rollout_of(output, self.engine.policy_version))
