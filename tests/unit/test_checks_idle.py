"""Settings that do nothing in a run are said where it starts, and refused where it is strict."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megarl.checks.idle import idle_settings
from megarl.checks.run import CheckedRun, check_ppo, schedule_problems, without_effect
from megarl.config.build import build_config
from megarl.config.router_losses import RouterLosses, router_losses
from megarl.config.schema import PPOConfig
from megarl.errors import ConfigError
from megarl.parallel.layout import Layout
from megarl.plan.report import no_effect_text
from megarl.roles import with_total_steps
from tests.unit.composed_configs import composed_values, ppo_config, roles_in, sft_config
from tests.unit.model_shapes import model_shape

ACTOR, ROLLOUT, REF = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.ref"
AXES = f"{ACTOR}.megatron"
KL_FREE = {f"{ACTOR}.use_kl_loss": None, "algorithm.kl_free": True}
GAE = {"algorithm.adv_estimator": "gae", f"{ACTOR}.use_kl_loss": False, f"{ROLLOUT}.n": 1}


def _idle(changes: Mapping[str, object]) -> dict[str, str]:
    """Return the keys of a GRPO run on 8 ranks that do nothing, each with why."""
    config = ppo_config(**changes)
    return {problem.key: problem.allowed for problem in idle_settings(config, roles_in(config))}


@pytest.mark.parametrize(
    ("changes", "key", "why"),
    [
        ({"algorithm.kl_ctrl.kl_coef": 0.01}, "algorithm.kl_ctrl.kl_coef", "only where algorithm.use_kl_in_reward is"),
        ({"algorithm.lam": 0.95}, "algorithm.lam", "has no effect on grpo; read by gae"),
        ({"algorithm.kl_ctrl.type": "adaptive"}, "algorithm.kl_ctrl.type", "steers the KL in the reward, which is off"),
        ({"critic.enable": True}, "critic.enable", "grpo reads no values, and no critic is built"),
        ({"critic.optim.lr": 1e-4}, "critic.optim.lr", "grpo reads no values, and no critic is built"),
        ({"critic.model.path": "other"}, "critic.model.path", "no critic is built"),
        (
            {**KL_FREE, f"{REF}.megatron.param_offload": True},
            f"{REF}.megatron.param_offload",
            "no KL term is on, and no reference is built",
        ),
        (
            {"reward.model.megatron.tensor_model_parallel_size": 2},
            "reward.model.megatron.tensor_model_parallel_size",
            "reward.model.path names no model",
        ),
        (
            {f"{ACTOR}.use_dynamic_bsz": True, f"{ACTOR}.ppo_micro_batch_size_per_gpu": 4},
            f"{ACTOR}.ppo_micro_batch_size_per_gpu",
            f"only where {ACTOR}.use_dynamic_bsz is false",
        ),
        (
            {f"{ACTOR}.lr_scheduler.type": "constant", f"{ACTOR}.optim.min_lr": 1e-7},
            f"{ACTOR}.optim.min_lr",
            "lr_scheduler.type is constant",
        ),
        ({f"{AXES}.recompute.method": "block"}, f"{AXES}.recompute.method", "granularity is null"),
        ({f"{AXES}.exp_avg_dtype": "bfloat16"}, f"{AXES}.exp_avg_dtype", "use_precision_aware_optimizer is true"),
        (
            {"trainer.total_training_steps": 5, "trainer.total_epochs": 3},
            "trainer.total_epochs",
            "trainer.total_training_steps is null",
        ),
    ],
)
def test_a_setting_that_does_nothing_is_named_once_with_why(changes: dict[str, object], key: str, why: str) -> None:
    found = _idle(changes)
    assert list(found) == [key]
    assert why in found[key]


@pytest.mark.parametrize("with_kl", [False, True])
def test_on_fsdp_a_reference_waits_on_the_host_where_there_is_one(with_kl: bool) -> None:
    offload, grpo = f"{REF}.fsdp_config.param_offload", {"algorithm.adv_estimator": "grpo", f"{ROLLOUT}.n": 4}
    kl = {f"{ACTOR}.use_kl_loss": with_kl, "algorithm.kl_free": not with_kl}
    values = composed_values("ppo_trainer", **{"actor_rollout_ref.model.path": "model", offload: True, **grpo, **kl})
    config = build_config(PPOConfig, values)
    idle = {problem.key: problem.allowed for problem in idle_settings(config, roles_in(config))}
    assert idle == ({} if with_kl else {offload: "has no effect: no KL term is on, and no reference is built"})


def test_what_follows_the_actors_value_is_not_given() -> None:
    assert _idle({f"{AXES}.param_offload": True, f"{ACTOR}.ppo_mini_batch_size": 64}) == {}
    assert _idle({"critic.enable": False}) == {}
    assert _idle({**GAE, "critic.optim.lr": 1e-4, "algorithm.lam": 0.95}) == {}


def test_an_engine_spreads_no_experts_of_a_dense_model(tmp_path: Path) -> None:
    spread = {f"{ROLLOUT}.tensor_model_parallel_size": 2, f"{ROLLOUT}.expert_parallel_size": 2}
    checked = _checked(tmp_path, **spread)
    idle = {p.key: p for p in idle_settings(checked.config, checked.roles)}
    assert idle[f"{ROLLOUT}.expert_parallel_size"].allowed == "has no effect: the model has no experts"
    with_experts = _checked(tmp_path, **spread, **{"actor_rollout_ref.model.path": "Qwen/Qwen3-30B-A3B"})
    assert f"{ROLLOUT}.expert_parallel_size" not in {
        p.key for p in idle_settings(with_experts.config, with_experts.roles)
    }


def _checked(folder: Path, **changes: object) -> CheckedRun[PPOConfig]:
    files = {"data.train_files": [str(folder / "a.parquet")], "data.val_files": [str(folder / "b.parquet")]}
    grpo = {"algorithm.adv_estimator": "grpo", f"{ROLLOUT}.n": 4, "actor_rollout_ref.model.path": "Qwen/Qwen3-8B"}
    values: dict[str, Any] = composed_values("ppo_megatron_trainer", **(files | grpo | changes))
    return check_ppo(values, files_may_be_missing=True)


KEEPS_ITS_FILE = {"algorithm.kl_ctrl.kl_coef": 0.01, f"{ACTOR}.ppo_mini_batch_size": 128}


def test_what_does_nothing_is_one_block_of_a_run_and_an_error_of_a_strict_one(tmp_path: Path) -> None:
    checked = _checked(tmp_path, **KEEPS_ITS_FILE)
    said = without_effect(checked, checked.num_steps)
    assert no_effect_text(said) == (
        "No effect in this run\n"
        "  algorithm.kl_ctrl.kl_coef = 0.01: has an effect only where algorithm.use_kl_in_reward is on\n"
    )
    assert no_effect_text([]) == ""
    with pytest.raises(ConfigError) as caught:
        _checked(tmp_path, **KEEPS_ITS_FILE, **{"trainer.strict": True})
    assert [p.key for p in caught.value.problems] == ["algorithm.kl_ctrl.kl_coef"]


def test_a_warm_up_longer_than_the_run_is_cut_and_said(tmp_path: Path) -> None:
    warm_up = {f"{ACTOR}.lr_scheduler.warmup_steps": 20, f"{ACTOR}.ppo_mini_batch_size": 1024}
    checked = _checked(tmp_path, **warm_up, **{"trainer.total_training_steps": 2})
    [said] = without_effect(checked, checked.num_steps)
    assert (said.key, said.value) == (f"{ACTOR}.lr_scheduler.warmup_steps", 20)
    assert said.allowed == "is cut to 7: the run has 8 optimizer steps"
    [actor, *_] = with_total_steps(checked.config, checked.roles, 2)
    assert actor.training is not None and actor.training.warm_up == 7
    assert list(schedule_problems(checked, 2)) == []
    with pytest.raises(ConfigError, match="is cut to 7"):
        _checked(tmp_path, **warm_up, **{"trainer.total_training_steps": 2, "trainer.strict": True})
    assert without_effect(_checked(tmp_path, **warm_up, **{"trainer.total_training_steps": 6}), 6) == []


def test_a_warm_up_is_a_share_of_the_run_or_so_many_steps() -> None:
    share = {"lr_scheduler.lr_warmup_steps_ratio": 0.1}
    [actor] = with_total_steps(config := sft_config(**share), roles_in(config), 30)
    assert actor.training is not None and actor.training.warm_up == 3


@pytest.mark.parametrize("axis", ["expert_model_parallel_size", "expert_tensor_parallel_size"])
def test_axes_of_experts_split_nothing_of_a_dense_model(axis: str) -> None:
    config = ppo_config(**{f"{AXES}.{axis}": 2, f"{AXES}.override_transformer_config": {"moe_z_loss_coeff": 0.1}})
    roles = roles_in(config, **{"actor_rollout_ref.model": model_shape()})
    assert roles[0].layout == Layout(8)
    keys = [problem.key for problem in idle_settings(config, roles)]
    assert keys == [f"{AXES}.{axis}", f"{AXES}.override_transformer_config.moe_z_loss_coeff"]
    with_experts = roles_in(config, **{"actor_rollout_ref.model": model_shape("Qwen3MoeForCausalLM")})
    assert idle_settings(config, with_experts) == [] and with_experts[0].layout != Layout(8)


def test_virtual_stages_without_a_pipeline_are_none() -> None:
    config = ppo_config(**{f"{AXES}.virtual_pipeline_model_parallel_size": 2})
    assert roles_in(config)[0].layout == Layout(8)


def test_a_balancing_loss_of_type_none_is_not_added() -> None:
    assert router_losses({"moe_aux_loss_coeff": 0.1, "moe_z_loss_coeff": 0.2}) == RouterLosses(0.0, 0.2)
    kind = {"moe_router_load_balancing_type": "seq_aux_loss"}
    assert router_losses({**kind, "moe_aux_loss_coeff": 0.1}) == RouterLosses(0.1, 0.0)
