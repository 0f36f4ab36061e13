from __future__ import annotations

import pytest

from megarl.algorithm.needs import aggregation, clip_range, reuses_update, reward_components, uses_kl_loss
from megarl.checks.algorithm import the_policy_loss_is_that_of_its_paper
from megarl.plan.algorithm import algorithm_lines
from tests.unit.composed_configs import ppo_config

ACTOR, ALGORITHM = "actor_rollout_ref.actor", "algorithm"
NULL = {f"{ACTOR}.use_kl_loss": None}


def test_grpo_has_a_kl_term_in_the_loss_where_nothing_else_is_said() -> None:
    assert uses_kl_loss(ppo_config(**NULL))


@pytest.mark.parametrize(
    "changes",
    [
        {f"{ALGORITHM}.kl_free": True},
        {f"{ALGORITHM}.use_kl_in_reward": True},
        {f"{ALGORITHM}.adv_estimator": "rloo"},
        {f"{ACTOR}.use_kl_loss": False},
    ],
)
def test_it_has_none_where_another_is_there_or_none_is_meant(changes: dict[str, object]) -> None:
    assert not uses_kl_loss(ppo_config(**(NULL | changes)))


@pytest.mark.parametrize(
    ("loss", "mode", "clips"),
    [
        ("ppo_clip", "token-mean", (0.2, 0.2)),
        ("gspo", "seq-mean-token-mean", (3e-4, 4e-4)),
        ("geo_mean", "seq-mean-token-mean", (0.4, 0.4)),
        ("cispo", "token-mean", (1.0, 0.2)),
    ],
)
def test_a_loss_has_the_settings_of_its_paper(loss: str, mode: str, clips: tuple[float, float]) -> None:
    c = ppo_config(**{f"{ACTOR}.policy_loss": loss})
    assert (aggregation(c), clip_range(c)) == (mode, clips)


def test_one_side_may_be_the_users_and_the_other_the_papers() -> None:
    assert clip_range(ppo_config(**{f"{ACTOR}.policy_loss": "gspo", f"{ACTOR}.clip_ratio_high": 1e-3})) == (3e-4, 1e-3)
    assert clip_range(ppo_config(**{f"{ACTOR}.clip_ratio": 0.1, f"{ACTOR}.clip_ratio_high": 0.3})) == (0.1, 0.3)


@pytest.mark.parametrize(
    "changes",
    [
        {f"{ACTOR}.policy_loss": "gspo", f"{ACTOR}.loss_agg_mode": "token-mean"},
        {f"{ACTOR}.policy_loss": "geo_mean", f"{ACTOR}.loss_agg_mode": "seq-mean-token-sum"},
        {f"{ACTOR}.policy_loss": "gpg", f"{ACTOR}.ppo_epochs": 2},
    ],
)
def test_what_makes_a_loss_another_algorithm_is_refused(changes: dict[str, object]) -> None:
    assert len(list(the_policy_loss_is_that_of_its_paper(ppo_config(**changes)))) == 1


def test_the_plan_shows_what_null_stands_for_and_what_a_temperature_means() -> None:
    c = ppo_config(**NULL, **{f"{ACTOR}.policy_loss": "gspo", "actor_rollout_ref.rollout.temperature": 0.6})
    estimator, loss, kl, temperature = algorithm_lines(c)
    assert estimator == "estimator: grpo"
    assert loss == "loss: gspo, clip 0.0003 below and 0.0004 above, seq-mean-token-mean"
    assert kl == "KL: 0.001 x kl in the loss"
    assert temperature.startswith("temperature 0.6: old log-probs, ratios and KL are of softmax(logits / 0.6)")
    assert len(algorithm_lines(ppo_config(**{"actor_rollout_ref.rollout.temperature": 1.0}))) == 3


def test_the_plan_names_what_an_algorithm_leaves_out_and_what_it_normalises_apart() -> None:
    correction = f"{ALGORITHM}.rollout_correction"
    gdpo = {
        f"{ALGORITHM}.adv_estimator": "gdpo",
        f"{ALGORITHM}.gdpo_reward_keys": ["correct", "format"],
        f"{ALGORITHM}.gdpo_reward_weights": [1, 0.5],
        f"{ALGORITHM}.overlong_filtering": True,
    }
    lines = algorithm_lines(ppo_config(**gdpo, **{f"{correction}.off_policy_mask_delta": 1e-4}))
    assert lines[0] == "estimator: gdpo of 1 x correct + 0.5 x format, each normalised by its group"
    assert lines[3] == "responses cut at the limit: in no loss; their rewards count in the baselines of their groups"
    assert lines[4] == (
        "engine against trainer: no loss where the advantage is negative and log(engine / policy) above 0.0001 a token"
    )
    rejection = [{"criterion": "geometric", "low": 0.5, "high": 2}]
    bypassed = ppo_config(**{f"{correction}.bypass": True, f"{correction}.rejections": rejection})
    assert algorithm_lines(bypassed)[3] == (
        "engine against trainer: its log-probs are the old ones (bypass), "
        "rejection by geometric in every optimizer step"
    )
    weighted = ppo_config(**{f"{correction}.level": "token"}), ppo_config(**{f"{correction}.preset": "k3_token_tis"})
    assert [algorithm_lines(c)[3] for c in weighted] == [
        "engine against trainer: weights of each token", "engine against trainer: k3_token_tis"
    ]  # fmt: skip


def test_components_are_those_of_an_estimator_that_reads_some_or_of_the_users_own() -> None:
    named = {f"{ALGORITHM}.gdpo_reward_keys": ["a"]}
    assert reward_components(ppo_config(**named)) == ()
    assert reward_components(ppo_config(**named, **{f"{ALGORITHM}.adv_estimator": "gdpo"})) == ("a",)
    assert reward_components(ppo_config(**named, **{f"{ALGORITHM}.adv_estimator": "mine"})) == ("a",)


@pytest.mark.parametrize(
    "changes",
    [
        {f"{ACTOR}.ppo_epochs": 2},
        {f"{ACTOR}.separate_old_log_probs": True},
        {f"{ACTOR}.policy_loss": "clip_cov"},
        {f"{ALGORITHM}.use_kl_in_reward": True, f"{ACTOR}.use_kl_loss": False},
        {f"{ALGORITHM}.rollout_correction.preset": "token_tis"},
        {f"{ALGORITHM}.rollout_correction.level": "token"},
        {f"{ALGORITHM}.rollout_correction.bypass": True},
    ],
)
def test_old_log_probs_have_a_pass_of_their_own_where_something_reads_them_before(changes: dict[str, object]) -> None:
    assert reuses_update(ppo_config())
    assert not reuses_update(ppo_config(**changes))
