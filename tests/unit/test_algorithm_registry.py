from __future__ import annotations

from collections.abc import Iterable

import pytest

from megarl import catalog
from megarl.algorithm.advantage import (
    AdvantageInputs,
    Advantages,
    AdvantageSettings,
    EstimatorRegistry,
    Needs,
    estimators,
)
from megarl.algorithm.aggregate import aggregations
from megarl.algorithm.covariance import token_selectors
from megarl.algorithm.kl import kl_estimators
from megarl.algorithm.kl_control import kl_controllers
from megarl.algorithm.policy_loss import policy_losses
from megarl.algorithm.registry import Registry
from megarl.algorithm.rollout_correction import criteria, presets
from megarl.errors import ConfigError
from megarl.monitor import sinks


@pytest.mark.parametrize(
    ("names", "registered"),
    [
        (catalog.ESTIMATORS, estimators.names()),
        (catalog.POLICY_LOSSES, policy_losses.names()),
        ([name for name, needs in catalog.POLICY_LOSSES.items() if needs.chosen_tokens], token_selectors.names()),
        (catalog.KL_LOSSES, kl_estimators.names()),
        (catalog.KL_CONTROLLERS, kl_controllers.names()),
        (catalog.AGGREGATIONS, aggregations.names()),
        (catalog.CRITERIA, criteria.names()),
        (catalog.CORRECTION_PRESETS, presets.names()),
        (catalog.SINKS, sinks._OPEN),
    ],
)
def test_the_functions_of_megarl_are_those_that_the_catalog_names(
    names: Iterable[str], registered: Iterable[str]
) -> None:
    assert sorted(names) == sorted(registered)


def test_penalties_in_the_reward_are_the_estimators_whose_value_counts() -> None:
    assert set(catalog.KL_ESTIMATORS) == {name for name in kl_estimators.names() if not name.endswith("+")}


def test_every_estimator_says_what_it_needs() -> None:
    needs = {name: estimators.needs(name) for name in estimators.names()}
    assert [name for name, need in needs.items() if need.values] == ["gae"]
    assert [name for name, need in needs.items() if need.greedy_baseline] == ["remax"]
    assert [name for name, need in needs.items() if need.components] == ["gdpo"]
    alone = {name for name, need in needs.items() if need.min_group_size == 1}
    assert alone == {"gae", "remax", "reinforce_plus_plus"}


def test_an_estimator_needs_what_the_catalog_says() -> None:
    assert {name: estimators.needs(name) for name in estimators.names()} == dict(catalog.ESTIMATORS)


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
