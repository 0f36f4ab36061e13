from __future__ import annotations

from hydra import compose, initialize_config_module

from megarl.config.defaults import default_of, default_values


def test_a_default_is_that_of_the_files() -> None:
    assert default_of("data.train_batch_size") == 1024
    assert default_of("actor_rollout_ref.actor.megatron.tensor_model_parallel_size") == 1


def test_whoever_composes_configs_meanwhile_goes_on_afterwards() -> None:
    default_values.cache_clear()
    with initialize_config_module("megarl.conf", version_base="1.3"):
        assert default_of("actor_rollout_ref.rollout.n") == 1
        assert compose("sft_trainer").data.messages_key == "messages"
