from __future__ import annotations

from dataclasses import replace

import pytest

from megarl.checks.effects import EFFECTS, Effect, settings_have_an_effect
from megarl.config.defaults import default_of
from megarl.config.schema import PPOConfig
from tests.unit.composed_configs import ppo_config

ROLLOUT, ACTOR = "actor_rollout_ref.rollout", "actor_rollout_ref.actor"
OVERLONG = {"reward.overlong_buffer.enable": True}
FILTER = {"algorithm.filter_groups.enable": True}
SAMPLES = {f"{ROLLOUT}.val_kwargs.temperature": 1.0}
MODEL_ALONE: dict[str, object] = {"reward.model.path": "judge"}
FUNCTION_TOO = MODEL_ALONE | {"reward.name": "gsm8k"}

# What turns a setting on; what a loss reads is turned on by the loss.
TURNED_ON: dict[str, dict[str, object]] = {
    f"{ACTOR}.clip_ratio": {f"{ACTOR}.clip_ratio_low": None},
    f"{ACTOR}.separate_old_log_probs": {f"{ACTOR}.ppo_epochs": 1},
    f"{ACTOR}.kl_loss_coef": {f"{ACTOR}.use_kl_loss": True},
    f"{ACTOR}.kl_loss_type": {f"{ACTOR}.use_kl_loss": True},
    "algorithm.kl_penalty": {"algorithm.use_kl_in_reward": True},
    "algorithm.kl_ctrl.kl_coef": {"algorithm.use_kl_in_reward": True},
    "algorithm.kl_ctrl.target_kl": {"algorithm.kl_ctrl.type": "adaptive"},
    "algorithm.kl_ctrl.horizon": {"algorithm.kl_ctrl.type": "adaptive"},
    "algorithm.filter_groups.max_num_gen_batches": FILTER,
    "reward.overlong_buffer.len": OVERLONG,
    "reward.overlong_buffer.penalty_factor": OVERLONG,
    "reward.function": {"reward.path": "r.py"},
    "reward.kwargs": {"reward.path": "r.py"},
    "reward.num_workers": FUNCTION_TOO,
    "reward.timeout_s": FUNCTION_TOO,
    "reward.batch_timeout_s": FUNCTION_TOO,
    "reward.try_first": FUNCTION_TOO,
    "reward.score_on_failure": FUNCTION_TOO,
    "reward.on_all_failed": FUNCTION_TOO,
    "reward.model.coef": MODEL_ALONE,
    f"{ROLLOUT}.nnodes": {f"{ROLLOUT}.placement": "server"},
    f"{ROLLOUT}.n_gpus_per_node": {f"{ROLLOUT}.placement": "server"},
    f"{ROLLOUT}.free_cache_engine": {f"{ROLLOUT}.placement": "colocated"},
    f"{ROLLOUT}.sglang.python": {f"{ROLLOUT}.name": "sglang"},
    f"{ROLLOUT}.disable_log_stats": {f"{ROLLOUT}.name": "vllm"},
    f"{ROLLOUT}.reproducible": {f"{ROLLOUT}.placement": "colocated"},
    f"{ROLLOUT}.val_kwargs.top_p": SAMPLES,
    f"{ROLLOUT}.val_kwargs.top_k": SAMPLES,
    f"{ROLLOUT}.val_kwargs.n": SAMPLES,
    "trainer.total_epochs": {"trainer.total_training_steps": None},
    "trainer.max_staleness": {"trainer.mode": "async"},
    "trainer.show_rollouts_freq": {"trainer.num_sampled_rollouts": 1},
}
TOKENS = {f"{ACTOR}.use_dynamic_bsz": True}
BY_TOKENS = ("ppo_max_token_len_per_gpu", "log_prob_max_token_len_per_gpu", "forward_max_token_len_per_gpu")
TURNED_OFF: dict[str, object] = {
    f"{ACTOR}.ppo_epochs": 2,
    f"{ACTOR}.use_kl_loss": False,
    f"{ACTOR}.policy_loss": "gpg",
    f"{ACTOR}.clip_ratio_low": 0.1,
    f"{ACTOR}.clip_ratio_high": 0.1,
    "trainer.total_training_steps": 5,
    "trainer.num_sampled_rollouts": 0,
}


def _other_than(default: object) -> object:
    """Return another value of the same type, within any range there is."""
    if isinstance(default, bool):
        return not default
    if isinstance(default, dict):
        return {"mine": 1}
    if default == "stop":
        return "continue"
    if isinstance(default, float):
        return default / 2 or 1.0
    if isinstance(default, int):
        return default * 2
    return 1 if default is None else "k3"


def _said_of(effect: Effect, config: PPOConfig) -> list[str]:
    return [p.fix for p in settings_have_an_effect(config) if p.key == effect.key]


@pytest.mark.parametrize("effect", EFFECTS, ids=lambda effect: effect.key)
def test_a_setting_changed_where_it_does_nothing_is_named_and_where_it_acts_is_none(effect: Effect) -> None:
    others = {f"{ROLLOUT}.reproducible": True, f"{ROLLOUT}.sglang.python": "python"}
    changed = {effect.key: others.get(effect.key, _other_than(default_of(effect.key)))}
    counts_rollouts = "micro_batch_size" in effect.key
    of_function = MODEL_ALONE if TURNED_ON.get(effect.key) is FUNCTION_TOO else {}
    is_of_ranks = effect.key.endswith(("free_cache_engine", "reproducible"))
    served = {f"{ROLLOUT}.placement": "server"} if is_of_ranks else {}
    served |= {f"{ROLLOUT}.name": "sglang"} if effect.key.endswith("disable_log_stats") else {}
    idle = ppo_config(**(TURNED_OFF | changed | of_function | served | (TOKENS if counts_rollouts else {})))
    assert effect.fix in _said_of(effect, idle)
    loss = effect.fix.removeprefix(f"{ACTOR}.policy_loss=") if "policy_loss=" in effect.fix else "ppo_clip"
    on = {f"{ACTOR}.policy_loss": loss, **TURNED_ON.get(effect.key, TOKENS if effect.key.endswith(BY_TOKENS) else {})}
    assert _said_of(effect, ppo_config(**(on | changed))) == []


def test_a_default_is_never_named_wherever_it_does_nothing() -> None:
    assert list(settings_have_an_effect(ppo_config(**{f"{ACTOR}.use_kl_loss": False}))) == []


def test_a_size_that_stands_for_another_pass_s_has_an_effect_there() -> None:
    rollouts_of_the_reference = {
        f"{ACTOR}.ppo_micro_batch_size_per_gpu": 4,
        f"{ACTOR}.use_dynamic_bsz": True,
        "actor_rollout_ref.ref.log_prob_use_dynamic_bsz": False,
    }
    assert list(settings_have_an_effect(ppo_config(**rollouts_of_the_reference))) == []
    own = {"actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": 2}
    (problem,) = settings_have_an_effect(ppo_config(**(rollouts_of_the_reference | own)))
    assert problem.key == f"{ACTOR}.ppo_micro_batch_size_per_gpu"
    assert problem.fix == f"leave {problem.key} out, or {ACTOR}.use_dynamic_bsz=false"


def test_a_loss_of_the_users_own_may_read_every_setting() -> None:
    settings = {e.key: _other_than(default_of(e.key)) for e in EFFECTS if "policy_loss" in e.key}
    own = ppo_config(**{f"{ACTOR}.policy_loss": "mine", "algorithm.path": __file__}, **settings)
    assert list(settings_have_an_effect(own)) == []
    ours = replace(own.actor_rollout_ref, actor=replace(own.actor_rollout_ref.actor, policy_loss="gpg"))
    assert len(list(settings_have_an_effect(replace(own, actor_rollout_ref=ours)))) == len(settings)
