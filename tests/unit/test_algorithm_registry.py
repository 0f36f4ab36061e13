from __future__ import annotations

import pytest

from megarl.algorithm.advantage import (
    AdvantageInputs,
    Advantages,
    AdvantageSettings,
    EstimatorRegistry,
    Needs,
    estimators,
)
from megarl.algorithm.aggregate import aggregations
from megarl.algorithm.kl import kl_estimators
from megarl.algorithm.policy_loss import policy_losses
from megarl.algorithm.registry import Registry
from megarl.errors import ConfigError


def test_every_name_that_the_config_promises_is_registered() -> None:
    group_estimators = {"grpo", "grpo_passk", "rloo", "opo", "gpg", "reinforce_plus_plus_baseline"}
    assert set(estimators.names()) == group_estimators | {"gae", "remax", "reinforce_plus_plus"}
    losses = {"ppo_clip", "gspo", "cispo", "geo_mean", "clip_cov", "kl_cov", "sapo", "gpg"}
    assert set(policy_losses.names()) == losses
    values = {"kl", "abs", "low_var_kl", "k1", "k3"}
    assert set(kl_estimators.names()) == values | {"mse", "k2"} | {f"{name}+" for name in values}
    modes = {"token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"}
    assert set(aggregations.names()) == modes


def test_every_estimator_says_what_it_needs() -> None:
    needs = {name: estimators.needs(name) for name in estimators.names()}
    assert [name for name, need in needs.items() if need.values] == ["gae"]
    assert [name for name, need in needs.items() if need.greedy_baseline] == ["remax"]
    alone = {name for name, need in needs.items() if need.min_group_size == 1}
    assert alone == {"gae", "remax", "reinforce_plus_plus"}


def test_a_users_estimator_is_registered_with_its_needs() -> None:
    mine = EstimatorRegistry("some.key")

    @mine.register("mine", Needs(values=True))
    def estimate(inputs: AdvantageInputs, settings: AdvantageSettings) -> Advantages:
        return Advantages(inputs.mask_BS.float())

    assert mine.get("mine") is estimate
    assert mine.needs("mine") == Needs(values=True)
    with pytest.raises(ConfigError, match="did you mean 'mine'"):
        mine.needs("mime")


def test_an_unknown_name_is_an_error_with_the_key_the_names_and_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        kl_estimators.get("low_var_k1")
    (problem,) = caught.value.problems
    assert problem.key == "actor_rollout_ref.actor.kl_loss_type"
    assert problem.value == "low_var_k1"
    assert problem.allowed == f"one of {', '.join(kl_estimators.names())}"
    assert problem.fix == "did you mean 'low_var_kl'?"


def test_an_unknown_name_is_reported_under_the_key_it_was_read_from() -> None:
    with pytest.raises(ConfigError, match=r"algorithm\.kl_penalty = 'k9'"):
        kl_estimators.get("k9", key="algorithm.kl_penalty")


def test_a_registered_function_is_found_and_a_taken_name_is_an_error() -> None:
    registry: Registry[object] = Registry("some.key")
    entry = object()
    registry.register("mine")(entry)
    assert registry.get("mine") is entry
    with pytest.raises(ConfigError, match=r"some\.key = 'mine'.*\n.*another name"):
        registry.register("mine")(object())
    assert registry.get("mine") is entry
