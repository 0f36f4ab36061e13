from __future__ import annotations

import pytest

from megarl.algorithm.advantage import estimators
from megarl.algorithm.aggregate import aggregations
from megarl.algorithm.kl import kl_estimators
from megarl.algorithm.policy_loss import policy_losses
from megarl.algorithm.registry import Registry
from megarl.errors import ConfigError


def test_every_name_that_the_config_promises_is_registered() -> None:
    assert {"grpo", "rloo"} <= set(estimators.names())
    assert policy_losses.names() == ("ppo_clip",)
    assert kl_estimators.names() == ("abs", "kl", "low_var_kl", "mse")
    assert aggregations.names() == ("seq-mean-token-mean", "seq-mean-token-sum", "token-mean")


def test_an_unknown_name_is_an_error_with_the_key_the_names_and_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        kl_estimators.get("low_var_k1")
    (problem,) = caught.value.problems
    assert problem.key == "actor_rollout_ref.actor.kl_loss_type"
    assert problem.value == "low_var_k1"
    assert problem.allowed == "one of abs, kl, low_var_kl, mse"
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
