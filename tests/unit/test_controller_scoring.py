"""What a person learns of a reward function that fails, and when a run with one stops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from megarl.checks.data_files import check_rewarded
from megarl.config.schema import RewardConfig
from megarl.controller.early_scores import early_scores
from megarl.controller.inputs import PPOInputs, SFTInputs
from megarl.controller.observer import Observer
from megarl.controller.open import open_sft_run, try_rewards
from megarl.controller.reward_log import RewardLog
from megarl.controller.scoring import Scorer
from megarl.data.order import Order
from megarl.data.verbs import verbs_tokenizer
from megarl.errors import DataError, ResourceError, RewardError
from megarl.reward.pool import RewardPool
from megarl.reward.registry import RewardSpec
from megarl.types import Group, Prompt, Rollout
from tests.unit.composed_configs import ppo_config, sft_config

# What the function does is in the ground truth.
REWARD = """
def compute_score(solution_str, ground_truth, **_):
    print("scoring", ground_truth)
    if ground_truth.startswith("raise"):
        raise ValueError(f"no unit in {ground_truth}")
    return float(ground_truth)
"""


@pytest.fixture
def spec(tmp_path: Path) -> RewardSpec:
    (tmp_path / "my_reward.py").write_text(REWARD)
    return RewardSpec(path=str(tmp_path / "my_reward.py"))


def prompt(ground_truth: str, data_source: str = "mine") -> Prompt:
    """Return a prompt named by its ground truth."""
    return Prompt("0:0", (1, 2), "text", data_source, ground_truth, {}, f"train.parquet:{ground_truth}")


@dataclass(frozen=True)
class Scored:
    """Scores of some ground truths, and what a person was told."""

    scores: list[float]
    told: list[str]


def score(
    spec: RewardSpec,
    folder: Path,
    *steps: Sequence[str],
    is_part: bool = False,
    config: RewardConfig | None = None,
    num_early: int = 0,
) -> Scored:
    """Score the rollouts of some steps, one for each ground truth. num_early: of each step that end before the rest."""
    told: list[str] = []
    config = config or ppo_config().reward
    scores: list[float] = []
    with RewardPool(1, 30.0, spec, config.score_on_failure) as pool, early_scores(pool, 1) as early:
        log = RewardLog(folder, told.append)
        scorer = Scorer(config, verbs_tokenizer(), 8, pool, None, Observer(), log, early=early if num_early else None)
        for truths in steps:
            prompts = [prompt(truth) for truth in truths]
            groups: list[Group] = [(Rollout((5,), (-0.1,), "stop", 0),) for _ in truths]
            for i in reversed(range(min(num_early, len(truths)))):
                scorer.begin(prompts[i], groups[i][0])
            rewards = scorer.score(prompts, groups, is_part)
            scores += rewards.scores_B.tolist()
    return Scored(scores, told)


def test_the_first_traceback_of_each_kind_and_the_counts_are_shown_and_kept(spec: RewardSpec, tmp_path: Path) -> None:
    done = score(spec, tmp_path, ["1", "raise a", "raise b", "nan"], ["2", "raise c"])
    assert done.scores == [1.0, 0.0, 0.0, 0.0, 2.0, 0.0]
    raised, invalid = done.told
    assert raised.startswith(
        "reward function raised: 2 rollouts. the first, train.parquet:raise a: ValueError: no unit"
    )
    assert "Traceback" in raised and "ValueError: no unit in raise a" in raised
    assert invalid.startswith("reward function invalid: 1 rollout. the first, train.parquet:nan: ")
    kept = (tmp_path / "reward_failures.txt").read_text()
    assert "raised: 3 rollouts" in kept and "invalid: 1 rollout." in kept
    assert kept.count("Traceback") == 1
    assert (tmp_path / "reward_printed.txt").read_text().splitlines()[:2] == ["scoring 1", "scoring raise a"]


@pytest.mark.parametrize("num_early", [1, 3, 4])
def test_rollouts_that_are_scored_early_have_the_same_rewards_and_failures_in_the_same_order(
    spec: RewardSpec, tmp_path: Path, num_early: int
) -> None:
    steps = ["1", "raise a", "nan", "0.1"], ["raise b", "2"]
    found = []
    for name, early in (("all at once", 0), ("early", num_early)):
        (tmp_path / name).mkdir()
        done = score(spec, tmp_path / name, *steps, num_early=early)
        told = [line.replace(name, "") for line in done.told]
        printed = sorted((tmp_path / name / "reward_printed.txt").read_text().splitlines())
        found.append((done.scores, told, (tmp_path / name / "reward_failures.txt").read_text(), printed))
    assert found[1] == found[0]


def test_a_step_whose_rewards_all_fail_ends_the_run_with_the_traceback(spec: RewardSpec, tmp_path: Path) -> None:
    with pytest.raises(RewardError) as caught:
        score(spec, tmp_path, ["raise a", "raise b"])
    text = str(caught.value)
    assert "failed on all 2 rollouts of a step. the first, train.parquet:raise a: raised: ValueError: no unit" in text
    assert 'raise ValueError(f"no unit in {ground_truth}")' in text
    assert "reward.on_all_failed=continue" in text
    assert (tmp_path / "reward_failures.txt").exists()


def test_such_a_step_goes_on_where_the_config_says_so_or_others_are_scored_beside_it(
    spec: RewardSpec, tmp_path: Path
) -> None:
    go_on = ppo_config(**{"reward.on_all_failed": "continue", "reward.score_on_failure": -1.0}).reward
    assert score(spec, tmp_path, ["raise a"] * 2, config=go_on).scores == [-1.0, -1.0]
    assert score(spec, tmp_path, ["raise a"] * 2, is_part=True).scores == [0.0, 0.0]


def test_rewards_of_which_only_the_sum_is_infinite_end_the_run(spec: RewardSpec, tmp_path: Path) -> None:
    buffer = replace(ppo_config().reward.overlong_buffer, enable=True, len=8, penalty_factor=3e38)
    with pytest.raises(RewardError, match="no finite number in float32"):
        score(spec, tmp_path, ["-3.3e38"], config=replace(ppo_config().reward, overlong_buffer=replace(buffer, len=8)))


def inputs(*prompts: Prompt) -> PPOInputs:
    """Return the inputs of a run on some prompts."""
    return PPOInputs(verbs_tokenizer(), prompts, (), Order(len(prompts), 1, False, 0), 1, (), (), ())


def test_a_function_is_tried_on_a_row_of_each_data_source(spec: RewardSpec) -> None:
    rows = prompt("1", "sums"), prompt("raise later", "sums"), prompt("2", "words")
    with RewardPool(1, 30.0, spec, 0.0) as pool:
        try_rewards(pool, ppo_config(), inputs(*rows))
        assert pool.take_printed().splitlines() == ["scoring 2", "scoring 1"]
        with pytest.raises(RewardError) as caught:
            try_rewards(pool, ppo_config(), inputs(*rows, prompt("raise now", "other")))
        try_rewards(pool, ppo_config(**{"reward.try_first": False}), inputs(prompt("raise now")))
    text = str(caught.value)
    assert text.startswith("the reward function failed on train.parquet:raise now, tried with its ground truth")
    assert 'raise ValueError(f"no unit in {ground_truth}")' in text and "reward.try_first=false" in text
    assert "it printed:" in text


def test_a_ground_truth_that_the_reward_never_matches_is_named_with_its_row() -> None:
    rows = prompt("18", "gsm8k"), prompt("eighteen", "gsm8k"), prompt("eighteen", "exact_match"), prompt("x", "gsm8k")
    with pytest.raises(DataError) as caught:
        check_rewarded(rows, ppo_config())
    text = str(caught.value)
    assert text.startswith(
        "train.parquet:eighteen: reward_model.ground_truth = 'eighteen': the reward 'gsm8k' can never"
    )
    assert "it is no number; 1 more rows have such ones" in text
    check_rewarded(rows, ppo_config(**{"reward.name": "exact_match"}))
    with pytest.raises(DataError, match="the reward 'gsm8k_flexible' can never match it"):
        check_rewarded(rows[2:3], ppo_config(**{"reward.name": "gsm8k_flexible"}))


def test_sinks_are_opened_before_any_rank_starts(tmp_path: Path) -> None:
    """Of this run no rank could start: it has no roles."""
    nothing = SFTInputs((), (), Order(1, 1, False, 0), 1, ())
    config = sft_config()
    with (
        pytest.raises(ResourceError, match=r"console\.log can't be written: its folder was removed"),
        open_sft_run(config, nothing, tmp_path / "gone", {}, None),
    ):
        pass
