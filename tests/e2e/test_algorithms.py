"""Every estimator with every place of the KL term, and every loss and correction, takes three real steps."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megarl.catalog import ESTIMATORS
from tests.e2e.algorithm_matrix import IMPOSSIBLE, KL, algorithms
from tests.forked import run_forked
from tests.tiny_task import NUM_RANKS

SCRIPT = ("-m", "tests.e2e.algorithm_matrix")
CASES = tuple(algorithms())
Steps = list[dict[str, Any]]
StepsOf = Callable[[str], Steps]

ON_FSDP = (*(case for case in CASES if case.endswith("kl in_loss")), "dapo", "dynamic batches", "critic warm-up")
# What asks other things of a run than its estimator, whose numbers tests/unit has; all others are long.
QUICK = (*("remax, kl none", "gdpo, kl none", "grpo, kl in_reward", "dapo", "critic warm-up", "correction bypass"),)


@pytest.fixture(scope="module")
def steps(tiny_task: Path) -> StepsOf:
    """Return what gives the metrics of a case's steps."""
    return _steps_of(tiny_task, "rl", CASES, QUICK)


@pytest.fixture(scope="module")
def fsdp_steps(tiny_task: Path) -> StepsOf:
    """Return what gives the metrics of the steps that a case takes on FSDP."""
    return _steps_of(tiny_task, "rl_fsdp", ON_FSDP, ())


def _steps_of(folder: Path, recipe: str, cases: Sequence[str], quick: Sequence[str]) -> StepsOf:
    """Run the quick cases, when one is asked for, in ranks that start once; so the long ones."""

    @cache
    def run_all(is_quick: bool) -> dict[str, Steps]:
        out = f"{recipe}.{'quick' if is_quick else 'long'}.json"
        names = [case for case in cases if (case in quick) == is_quick]
        finished = run_forked("run", (*SCRIPT, out, recipe, *names), folder, num_ranks=NUM_RANKS, timeout_s=900.0)
        assert finished.code == 0, finished.output
        results: dict[str, Steps] = json.loads((folder / out).read_text())
        return results

    return lambda case: run_all(case in quick)[case]


def _params(cases: Sequence[str], quick: Sequence[str]) -> list[Any]:
    return [pytest.param(case, marks=[] if case in quick else pytest.mark.long) for case in cases]


def test_the_cases_hold_every_estimator_with_every_place_of_the_kl() -> None:
    every = {(name, where) for name in ESTIMATORS for where in KL}
    assert {f"{name}, kl {where}" for name, where in every - IMPOSSIBLE} < set(CASES)


@pytest.mark.parametrize("case", _params(CASES, QUICK))
def test_three_steps_give_finite_metrics_and_move_the_weights(steps: StepsOf, case: str) -> None:
    _assert_trained(steps(case), case)


@pytest.mark.long
@pytest.mark.parametrize("case", ON_FSDP)
def test_every_estimator_takes_three_steps_on_fsdp(fsdp_steps: StepsOf, case: str) -> None:
    _assert_trained(fsdp_steps(case), case)


def _assert_trained(lines: Steps, case: str) -> None:
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(value is not None and math.isfinite(value) for line in lines for value in line.values())
    trained = [line for line in lines if "actor/grad_norm" in line]
    assert len(trained) == (2 if case == "critic warm-up" else 3)
    assert any(line["actor/grad_norm"] > 0 for line in trained)
    assert all(line["rollout_train/logprob_diff_max"] < 1e-4 for line in lines), "the engine lost the trainer's weights"


@pytest.mark.parametrize("case", _params([case for case in CASES if "kl in_" in case], QUICK))
def test_the_kl_term_is_where_it_was_asked_for(steps: StepsOf, case: str) -> None:
    for line in steps(case):
        assert ("actor/kl" in line) == ("in_loss" in case)
        assert ("reward/kl_coef" in line) == ("in_reward" in case)


def test_the_adaptive_coefficient_follows_the_kl(steps: StepsOf) -> None:
    coefs = [line["reward/kl_coef"] for line in steps("grpo, kl in_reward")]
    assert coefs[0] == 0.001
    assert len(set(coefs)) == 3


def test_the_critic_learns_while_the_actor_waits(steps: StepsOf) -> None:
    first, second, _ = steps("critic warm-up")
    assert "actor/loss" not in first
    assert first["critic/grad_norm"] > 0
    assert second["rollout/policy_version"] == first["rollout/policy_version"] == 0


def test_dynamic_sampling_and_overlong_shaping_leave_their_marks(steps: StepsOf) -> None:
    assert all("time_s/resample" in line for line in steps("dapo"))
    assert any(line["reward/overlong_penalty_mean"] < 0 for line in steps("dapo"))


@pytest.mark.parametrize("case", _params([case for case in CASES if "bypass" in case], QUICK))
def test_a_bypass_saves_the_pass_and_leaves_no_difference(steps: StepsOf, case: str) -> None:
    assert all(line["rollout_train/logprob_diff_max"] == 0 for line in steps(case))
    assert all("time_s/score_actor" not in line for line in steps(case))


@pytest.mark.long
def test_what_an_update_corrects_shows_in_its_metrics(steps: StepsOf) -> None:
    for case in ("correction bypass, rejecting", "correction bypass, weighted", "off-policy mask"):
        for line in steps(case):
            assert abs(line["actor/engine_kl"]) < 1e-4
            assert 0 <= line["actor/masked_fraction"] <= 1
    # Trainer and engine agree within rounding: nothing is far enough to reject, and weights are 1.
    assert all(line["actor/masked_fraction"] == 0 for line in steps("correction bypass, rejecting"))
    weighted = [line["actor/engine_weight"] for line in steps("correction bypass, weighted")]
    assert weighted == pytest.approx([1.0] * 3, abs=1e-4)
    assert not any("actor/masked_fraction" in line for line in steps("correction bypass"))


@pytest.mark.long
def test_responses_that_are_cut_are_counted(steps: StepsOf) -> None:
    for case in ("overlong filtering", "correction icepop"):
        shares = [line["response/share_cut"] for line in steps(case)]
        assert min(shares) > 0.5, "six tokens are few"
        assert min(shares) < 1, "and some response ends before"


def test_components_are_shown_by_name(steps: StepsOf) -> None:
    for line in steps("gdpo, kl none"):
        assert line["reward/component/digits"] == pytest.approx(line["reward/mean"])
        assert line["reward/component/length"] > 1
