"""Which groups a step gets where rollouts are sampled all the time, and how old they may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import cast

import pytest
import torch

from megarl.algorithm.samples import Rewards, Samples
from megarl.batching.pack import rollouts_to_batch
from megarl.checkpoint.rollouts_ahead import RolloutsAhead
from megarl.controller.engine_servers import Asked, EngineServers
from megarl.controller.engines import Ended
from megarl.controller.sampler import RolloutSampler
from megarl.controller.stream_sampler import StreamSampler
from megarl.monitor.timing import Stopwatch
from megarl.types import GenerationRequest, Group, Prompt, Rollout, Sampling

SIZE = 4


@dataclass
class Steps:
    """Stands for the sampler of one step. The token of a prompt is its place in the run."""

    sampling: Sampling = field(default_factory=Sampling)
    stopwatch: Stopwatch = field(default_factory=Stopwatch)

    def prompts_of(self, step: int) -> list[Prompt]:
        first = (step - 1) * SIZE
        return [Prompt(str(place), (place,), "", "", "", {}, "") for place in range(first, first + SIZE)]

    def scoring_of(self, prompts: Sequence[Prompt]) -> Ended:
        def ended(place: int, rollout: Rollout) -> None:
            assert prompts[place].token_ids[0] == rollout.token_ids[0]

        return ended

    def requests(self, step: int) -> list[GenerationRequest]:
        return [GenerationRequest(prompt.token_ids, seed=step) for prompt in self.prompts_of(step)]

    def samples(self, step: int, groups: Sequence[Group], prompts: Sequence[Prompt]) -> Samples:
        batch = rollouts_to_batch([(1,)] * len(groups), groups)
        return Samples(tuple(prompts), tuple(groups), Rewards((), torch.zeros(len(groups)), None), batch)


@dataclass
class Engines:
    """Engines whose groups are complete in any order, or only when they are waited for."""

    random: Random
    is_lazy: bool = False
    policy_version: int = 0
    asked: list[int] = field(default_factory=list)
    ended: dict[int, Ended] = field(default_factory=dict)

    @property
    def engines(self) -> Engines:
        return self

    def ask(self, requests: Sequence[GenerationRequest], sampling: Sampling, ended: Ended) -> Asked:
        self.ended[requests[0].token_ids[0]] = ended
        self.asked += [request.token_ids[0] for request in requests]
        return Asked(cast(EngineServers, self.policy_version), requests, sampling, ())

    def collect_complete(self, asked: Sequence[Asked], least: int) -> dict[int, Group]:
        assert len(asked) >= least, "this wait would never end"
        num_complete = least if self.is_lazy else self.random.randint(least, len(asked))
        complete = self.random.sample(range(len(asked)), num_complete)
        return {i: self._group(asked[i]) for i in complete}

    def _group(self, one: Asked) -> Group:
        begun = cast(int, one.servers)
        switches = ((1, self.policy_version),) if self.policy_version > begun else ()
        place = one.requests[0].token_ids[0]
        rollout = Rollout((place, 0), (-1.0, -1.0), "stop", begun, switches)
        self.ended[place](0, rollout)
        return (rollout,)


def sampler_of(
    seed: int, last_step: int, max_staleness: int, ahead: RolloutsAhead | None = None, is_lazy: bool = False
) -> tuple[StreamSampler, Engines]:
    """Return a sampler with its engines."""
    engines = Engines(Random(seed), is_lazy)
    sampler = StreamSampler(
        cast(RolloutSampler, Steps()), cast(EngineServers, engines), last_step, max_staleness, ahead
    )
    return sampler, engines


def train(sampler: StreamSampler, engines: Engines, steps: range) -> list[int]:
    """Take some steps, publish after each, and return the places that were trained on."""
    trained = []
    for step in steps:
        samples = sampler.take(step)
        assert len(samples.groups) == SIZE and samples.current_version == engines.policy_version
        for prompt, (rollout,) in zip(samples.prompts, samples.groups, strict=True):
            assert prompt.token_ids[0] == rollout.token_ids[0]
            assert 0 <= engines.policy_version - rollout.policy_version <= sampler.max_staleness
            trained.append(prompt.token_ids[0])
        with sampler.paused():
            engines.policy_version += 1
    return trained


@pytest.mark.parametrize("max_staleness", [1, 2, 5])
@pytest.mark.parametrize("seed", range(10))
def test_every_prompt_is_trained_on_once_by_weights_that_are_new_enough(seed: int, max_staleness: int) -> None:
    sampler, engines = sampler_of(seed, 12, max_staleness)
    trained = train(sampler, engines, range(1, 13))
    assert sorted(trained) == list(range(12 * SIZE)) == sorted(engines.asked)
    assert sampler.state() is None


def test_engines_have_what_is_asked_for_as_many_steps_ahead_as_it_may_be_old() -> None:
    sampler, engines = sampler_of(0, 10, 2)
    asked = []
    for step in range(1, 11):
        train(sampler, engines, range(step, step + 1))
        asked.append(len(engines.asked) // SIZE)
    assert asked == [3, 4, 5, 6, 7, 8, 9, 10, 10, 10]


def test_the_age_of_rollouts_reaches_what_is_allowed() -> None:
    sampler, engines = sampler_of(0, 6, 2, is_lazy=True)
    ages = []
    for step in range(1, 7):
        samples = sampler.take(step)
        ages.append(max(engines.policy_version - group[0].policy_version for group in samples.groups))
        engines.policy_version += 1
    assert max(ages) == 2


def test_weights_that_are_published_twice_in_a_step_leave_nothing_too_old() -> None:
    sampler, engines = sampler_of(3, 6, 1)
    trained = train(sampler, engines, range(1, 3))
    engines.policy_version += 1  # after a step was taken back
    trained += train(sampler, engines, range(3, 7))
    assert sorted(trained) == list(range(6 * SIZE))
    assert len(engines.asked) > 6 * SIZE


@pytest.mark.parametrize("seed", range(5))
def test_a_run_that_goes_on_trains_on_every_prompt_once(seed: int) -> None:
    sampler, engines = sampler_of(seed, 8, 3)
    trained = train(sampler, engines, range(1, 5))
    state = sampler.state()
    assert state is not None and any(state.groups)
    resumed, later = sampler_of(seed + 1, 8, 3, ahead=state)
    later.policy_version = engines.policy_version
    trained += train(resumed, later, range(5, 9))
    assert sorted(trained) == list(range(8 * SIZE))


def test_a_run_that_goes_on_with_another_sampling_samples_anew() -> None:
    sampler, engines = sampler_of(0, 8, 1)
    train(sampler, engines, range(1, 3))
    state = sampler.state()
    resumed, later = sampler_of(0, 8, 1, ahead=state)
    resumed.sampler.sampling = Sampling(temperature=0.5)
    later.policy_version = engines.policy_version
    trained = train(resumed, later, range(3, 9))
    assert sorted(trained) == list(range(2 * SIZE, 8 * SIZE)) == sorted(later.asked)
