from __future__ import annotations

import pytest

from megarl.catalog import ESTIMATORS, POLICY_LOSSES
from megarl.checks.effects import EFFECTS
from megarl.config.defaults import default_of, default_values


@pytest.mark.parametrize("key", sorted({effect.key for effect in EFFECTS}))
def test_a_key_that_is_judged_by_its_default_has_one_in_conf(key: str) -> None:
    default_of(key)


def test_a_default_is_a_plain_value_of_a_main_config() -> None:
    assert default_of("algorithm.gamma") == 1.0
    assert default_of("trainer.experiment_name", "sft_trainer") == "sft"
    assert default_values("ppo_trainer")["actor_rollout_ref"]["actor"]["strategy"] == "fsdp"


def test_a_default_that_is_another_keys_is_none_to_compare_with() -> None:
    with pytest.raises(AssertionError, match="no default of its own"):
        default_of("critic.shuffle")


def test_what_the_catalog_says_is_read_are_keys() -> None:
    for name, needs in ESTIMATORS.items():
        assert all(default_of(f"algorithm.{key}") is not None for key in needs.uses), name
    for loss in POLICY_LOSSES.values():
        for key in loss.uses:
            default_of(f"actor_rollout_ref.actor.{key}")
