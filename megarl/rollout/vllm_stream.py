"""A vLLM that samples while it is asked for more: one rank of an engine in processes of its own.

Every rank of the engine schedules for itself, as in ``VllmEngine``, so that all must be told the same between the same
two steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from megarl.rollout.engine import check_published
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
    _versions: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    _taken: Take | None = None

    def add(self, ask: Ask) -> None:
        """Sample the rollouts of a prompt from the next step on, as ``VllmEngine.generate`` would.

        Raises DataError for a prompt that leaves no room to answer, PublishError before the first publication.
        """
        check_published(self.engine.policy_version)
        self._wake()
        self.engine.check_lengths([ask.request], ask.sampling)
        of_each, prompt = samplings(ask.sampling), {"prompt_token_ids": list(ask.request.token_ids)}
        for index in ask.indices:
            params = sampling_params(of_each[index], sample_seed(ask.request.seed, index))
            name = f"{ask.number}-{index}"
            self._versions[name] = [(0, self.engine.policy_version)]
            self.engine.stepped.add_request(name, prompt, params)

    @property
    def is_busy(self) -> bool:
        """Whether rollouts are unfinished."""
        return bool(self.engine.stepped.has_unfinished_requests())

    def step(self) -> list[Done]:
        """Sample a token of as many rollouts as fit, and return those that have ended."""
        return [self._done(output) for output in self.engine.stepped.step() if output.finished]

    def take(self, order: Take) -> None:
        """Change the weights, and forget all that was computed with others.

        Unfinished rollouts keep their tokens, whose keys and values are computed anew: with those of the older weights
        kept, the tokens after them would be those of no policy.
        """
        if self.is_busy:
            self.engine.stepped.reset_prefix_cache(reset_running_requests=True)
        self.engine.wake_weights()
        self.taker.take(order)
        self._taken = order
        for state in self.engine.stepped.output_processor.request_states.values():
            versions, num_tokens = self._versions[state.external_req_id], state.detokenizer.num_output_tokens()
            if versions[-1][0] == num_tokens:  # of which none is sampled yet
                versions.pop()
            versions.append((num_tokens, order.policy_version))

    def rest(self) -> None:
        """Give up weights and KV cache. The weights that it took last are taken once more where they are asked for."""
        self.engine.sleep()

    def _wake(self) -> None:
        """Have all memory, with the weights that were taken last: the trainer's memory still has them."""
        if self.engine.has_lost_weights:
            assert self._taken is not None
            self.engine.wake_weights()
            self.taker.take(self._taken)
        self.engine.wake_up()

    def _done(self, output: RequestOutput) -> Done:
        number, index = output.request_id.split("-")
        (_, first), *switches = self._versions.pop(output.request_id)
        return Done(int(number), int(index), replace(rollout_of(output, first), switches=tuple(switches)))
