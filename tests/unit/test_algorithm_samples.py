from __future__ import annotations

import pytest
import torch

from megarl.algorithm.samples import Rewards
from megarl.types import RewardResult


def _results(*scores: float) -> tuple[RewardResult, ...]:
    return tuple(RewardResult(score, "ok") for score in scores)


def _with_parts(*parts: tuple[float, ...]) -> Rewards:
    """Return rewards whose scores are all 1, of these components."""
    results = tuple(RewardResult(1.0, "ok", components=each) for each in parts)
    return Rewards(results, torch.zeros(len(parts)), component_names=("correct", "format"))


def test_components_are_a_column_by_name_with_their_means() -> None:
    rewards = _with_parts((1.0, 0.5), (0.0, 0.5))
    assert rewards.components_BK is not None and rewards.components_BK.tolist() == [[1.0, 0.5], [0.0, 0.5]]
    metrics = rewards.metrics()
    assert (metrics["reward/component/correct"], metrics["reward/component/format"]) == (0.5, 0.5)
    assert Rewards(_results(1.0), torch.zeros(1)).components_BK is None


def test_a_group_teaches_where_scores_differ_or_where_there_are_components_one_of_those() -> None:
    group_B = torch.tensor([0, 0, 1, 1])
    scores = Rewards(_results(1.0, 1.0, 0.0, 1.0), torch.tensor([0.0, -1.0, 0.0, 0.0]))
    assert scores.has_spread(group_B).tolist() == [False, False, True, True]
    parts = _with_parts((1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (1.0, 1.0))
    assert parts.has_spread(group_B).tolist() == [True, True, False, False]


def test_fresh_groups_bring_their_components() -> None:
    after = _with_parts((0.0, 0.0), (0.0, 1.0)).with_groups([1], _with_parts((5.0, 6.0)), n=1)
    assert after.components_BK is not None and after.components_BK.tolist() == [[0.0, 0.0], [5.0, 6.0]]


def test_a_reward_is_the_function_s_and_coef_times_the_model_s_and_the_penalty_of_length() -> None:
    rewards = Rewards(_results(1.0, 0.0), torch.tensor([0.0, -0.5]), torch.tensor([2.0, -4.0]), 0.25)
    assert rewards.unpenalized == (1.5, -1.0)
    assert rewards.scores_B.tolist() == [1.5, -1.5]
    metrics = rewards.metrics()
    assert (metrics["reward/mean"], metrics["reward/model_mean"], metrics["reward/function_mean"]) == (0.0, -1.0, 0.5)


def test_each_may_score_alone() -> None:
    none = torch.zeros(2)
    function = Rewards(_results(1.0, 0.0), none)
    assert function.scores_B.tolist() == [1.0, 0.0] and "reward/model_mean" not in function.metrics()
    model = Rewards((), none, torch.tensor([3.0, 1.0]), 2.0)
    assert model.scores_B.tolist() == [6.0, 2.0]
    assert model.metrics()["reward/model_mean"] == 2.0 and "reward/function_mean" not in model.metrics()


@pytest.mark.parametrize("has_function", [True, False])
@pytest.mark.parametrize("has_model", [True, False])
def test_fresh_groups_bring_all_of_their_rewards(has_function: bool, has_model: bool) -> None:
    def rewards(*scores: float) -> Rewards:
        results = _results(*scores) if has_function else ()
        model_B = 10 * torch.tensor(scores) if has_model else None
        return Rewards(results, -torch.tensor(scores) / 10, model_B)

    before = rewards(0.0, 1.0, 2.0, 3.0, 4.0, 5.0)
    after = before.with_groups([2, 0], rewards(6.0, 7.0, 8.0, 9.0), n=2)
    expected = rewards(8.0, 9.0, 2.0, 3.0, 6.0, 7.0)
    assert after.results == expected.results
    assert after.penalties_B.equal(expected.penalties_B)
    assert after.model_B is expected.model_B or after.model_B.equal(expected.model_B)


def test_the_mean_of_finite_rewards_is_finite() -> None:
    metrics = Rewards(_results(3e38, 3e38, 1e38), torch.zeros(3)).metrics()
    assert metrics["reward/mean"] == pytest.approx(7e38 / 3)
    assert metrics["reward/std"] == pytest.approx(9.428e37, rel=1e-3)


def test_what_went_wrong_is_counted_by_its_kind_and_scores_as_it_is_told_to() -> None:
    results = (
        RewardResult(1.0, "ok"),
        *(RewardResult(-0.5, "raised") for _ in range(3)),
        *(RewardResult(-0.5, "timeout") for _ in range(2)),
        RewardResult(-0.5, "invalid"),
        RewardResult(1.0, "ok"),
    )
    metrics = Rewards(results, torch.zeros(8)).metrics()
    assert [metrics[f"reward/num_{kind}"] for kind in ("raised", "timeout", "invalid")] == [3, 2, 1]
    assert (metrics["reward/min"], metrics["reward/mean"]) == (-0.5, (2 * 1.0 - 6 * 0.5) / 8)
