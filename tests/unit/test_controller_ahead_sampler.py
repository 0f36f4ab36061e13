"""Which rollouts a step gets, and when they are asked for, where they are sampled a step ahead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch

from megarl.algorithm.samples import Rewards, Samples
from megarl.batching.pack import rollouts_to_batch
from megarl.checkpoint.rollouts_ahead import RolloutsAhead
from megarl.controller.ahead_sampler import AheadSampler
from megarl.controller.engine_servers import EngineServers
from megarl.controller.engines import Ended
from megarl.controller.sampler import RolloutSampler
from megarl.monitor.timing import Stopwatch
from megarl.types import GenerationRequest, Group, Prompt, Rollout, Sampling


@dataclass
class Steps:
    """Stands for the sampler of one step: a step's requests have its number as their seed."""

    sampling: Sampling = field(default_factory=Sampling)
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    begun: list[tuple[str, int]] = field(default_factory=list)

    def requests(self, step: int) -> list[GenerationRequest]:
        return [GenerationRequest((place,), step) for place in range(2)]

    def prompts_of(self, step: int) -> list[Prompt]:
        return [Prompt(f"{step}:{place}", (place,), "", "", "", {}, "") for place in range(2)]

    def scoring_of(self, prompts: Sequence[Prompt]) -> Ended:
        return lambda place, rollout: self.begun.append((prompts[place].uid, rollout.token_ids[0]))

    def samples(self, step: int, groups: Sequence[Group]) -> Samples:
        batch = rollouts_to_batch([(1,)] * len(groups), groups)
        return Samples((), tuple(groups), Rewards((), torch.zeros(len(groups)), None), batch)


@dataclass
class Engines:
    """Engines that answer with the seed and the publication. log: what happened, in order."""

    policy_version: int = 0
    log: list[str] = field(default_factory=list)

    @property
    def engines(self) -> Engines:
        return self

    def ask(self, requests: Sequence[GenerationRequest], sampling: Sampling, ended: Ended) -> Any:
        self.log.append(f"ask {requests[0].seed}")
        engines, version = self, self.policy_version

        class Asked:
            def __init__(self) -> None:
                self.requests, self.sampling = requests, sampling

            def result(self) -> list[Group]:
                engines.log.append(f"wait {requests[0].seed}")
                groups: list[Group] = [(Rollout((r.seed,), (-1.0,), "stop", version),) for r in requests]
                for place, (rollout,) in enumerate(groups):
                    ended(place, rollout)
                return groups

        return Asked()


def sampler_of(last_step: int = 3, ahead: RolloutsAhead | None = None) -> tuple[AheadSampler, Engines]:
    """Return a sampler with its engines."""
    engines = Engines()
    return AheadSampler(cast(RolloutSampler, Steps()), cast(EngineServers, engines), last_step, ahead), engines


def test_the_next_step_is_asked_for_before_a_step_is_trained_and_ends_before_weights_change() -> None:
    sampler, engines = sampler_of()
    found = []
    for step in (1, 2, 3):
        samples = sampler.take(step)
        engines.log.append(f"train {step}")
        with sampler.paused():
            engines.policy_version += 1
        found.append(([g[0].token_ids[0] for g in samples.groups], samples.groups[0][0].policy_version))
        assert samples.current_version == step - 1
    steps = cast(Steps, sampler.sampler)
    assert steps.begun == [(f"{step}:{place}", step) for step in (1, 2, 3) for place in range(2)]
    assert engines.log == [
        *("ask 1", "wait 1", "ask 2", "train 1", "wait 2"),
        *("ask 3", "train 2", "wait 3", "train 3"),
    ]
    assert found == [([1, 1], 0), ([2, 2], 0), ([3, 3], 1)]


def test_what_is_ahead_when_a_run_is_saved_is_what_it_goes_on_with() -> None:
    sampler, _ = sampler_of()
    sampler.take(1)
    ahead = sampler.finished_ahead()
    assert ahead is not None and ahead.step == 2
    resumed, others = sampler_of(ahead=ahead)
    assert resumed.take(2).groups == tuple(ahead.groups)
    assert others.log == ["ask 3"]
    assert sampler.take(2).groups == tuple(ahead.groups)


def test_what_a_checkpoint_has_ahead_is_left_where_a_run_goes_on_with_other_prompts_seeds_or_sampling() -> None:
    sampler, _ = sampler_of()
    sampler.take(1)
    ahead = sampler.finished_ahead()
    assert ahead is not None
    for other in (
        replace(ahead, requests=ahead.requests[::-1]),
        replace(ahead, requests=tuple(replace(r, seed=9) for r in ahead.requests)),
        replace(ahead, sampling=replace(ahead.sampling, temperature=0.5)),
        replace(ahead, step=3),
    ):
        resumed, engines = sampler_of(ahead=other)
        assert [g[0].token_ids for g in resumed.take(2).groups] == [(2,), (2,)]
        assert engines.log == ["ask 2", "wait 2", "ask 3"]


def test_nothing_is_ahead_of_the_last_step() -> None:
    sampler, engines = sampler_of(last_step=1)
    sampler.take(1)
    assert sampler.finished_ahead() is None
    assert engines.log == ["ask 1", "wait 1"]
