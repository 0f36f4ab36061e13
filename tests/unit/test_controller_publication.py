from __future__ import annotations

from typing import Any

import pytest
import torch

from megarl.controller.engine_on_ranks import EngineOnRanks
from megarl.controller.observer import Observer
from megarl.controller.publication import Publication
from megarl.controller.role_on_ranks import RoleOnRanks
from megarl.errors import PublishError
from megarl.monitor.timing import Stopwatch
from megarl.parallel.layout import Layout
from megarl.types import Prompt, Rollout
from tests.unit.small_roles import role_on
from tests.unit.stand_ins import PlainRanks

ENGINES = -0.5


def _published(trainers: float, times: int, verify: str = "first") -> tuple[Publication, PlainRanks]:
    """Publish to an engine whose every log-prob is ENGINES the weights of an actor whose every one is ``trainers``."""

    def answer(rank: int, verb: str, work: Any) -> Any:
        if verb == "generate":
            return tuple((Rollout((7, 8), (ENGINES, ENGINES), "stop", 0),) for _ in work.requests)
        if verb == "score":
            assert work.temperature == 1.0  # as the engine's greedy ones
            return torch.where(work.sequences.mask_BS, trainers, 0.0)
        return None

    ranks = PlainRanks(1, answer)
    actor = RoleOnRanks(role_on(Layout(1)), ranks, 0, Stopwatch(), temperature=0.7)
    prompts = [Prompt(f"f:{row}", (3, 4), "", "", "", {}, "") for row in range(20)]
    publication = Publication(EngineOnRanks(ranks, 1, Observer()), prompts, 2, verify)
    for _ in range(times):
        publication.publish(actor)
    return publication, ranks


def test_publications_are_counted_and_the_first_is_checked() -> None:
    publication, ranks = _published(ENGINES, times=3)
    assert publication.policy_version == 2
    assert ranks.verbs() == ["publish", "generate", "rest", "score", "publish", "publish"]
    assert _works(ranks) == [(0, True), (1, False), (2, False)]


def test_always_compares_the_checksums_of_every_publication_and_the_log_probs_of_the_first() -> None:
    _, ranks = _published(ENGINES, times=3, verify="always")
    assert ranks.verbs() == ["publish", "generate", "rest", "score", "publish", "publish"]
    assert _works(ranks) == [(0, True), (1, True), (2, True)]


def test_never_does_nothing_but_publish() -> None:
    _, ranks = _published(ENGINES + 3, times=2, verify="never")
    assert ranks.verbs() == ["publish", "publish"]
    assert _works(ranks) == [(0, False), (1, False)]


def _works(ranks: PlainRanks) -> list[tuple[int, bool]]:
    """Return the number of each publication, and whether checksums were asked for."""
    works = [work for verb, arguments in ranks.calls if verb == "publish" for work in arguments]
    return [(work.policy_version, work.verify) for work in works]


@pytest.mark.parametrize("trainers", [ENGINES - 0.6, ENGINES + 0.6])
def test_an_engine_that_runs_other_weights_is_an_error_with_how_far_it_is_off(trainers: float) -> None:
    with pytest.raises(PublishError, match=r"differ from the trainer's by up to 0\.6 \(allowed 0\.5\)"):
        _published(trainers, times=1)


@pytest.mark.parametrize("trainers", [float("nan"), float("-inf")])
def test_log_probs_that_are_no_numbers_are_called_so(trainers: float) -> None:
    says = r"the trainer's log-probs of 16 of 16 greedy tokens are NaN or infinite: .* overflows in bfloat16"
    with pytest.raises(PublishError, match=says):
        _published(trainers, times=1)


def test_what_another_order_of_computing_makes_of_a_log_prob_is_allowed() -> None:
    assert _published(ENGINES - 0.4, times=1)[0].policy_version == 0
