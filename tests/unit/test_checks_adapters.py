from __future__ import annotations

from dataclasses import replace

import pytest

from megarl.checks.adapters import (
    adapted_modules_exist,
    adapters_are_asked_for,
    adapters_are_on_fsdp,
    adapters_have_modules,
)
from megarl.checks.run import check_ppo, without_effect
from megarl.config.schema import ModelConfig
from megarl.errors import ConfigError
from megarl.parallel.layout import Layout
from megarl.plan.sizes import FP32_BYTES
from megarl.plan.static import static_of
from megarl.verify.roles import TRAINING, role_on
from megarl.weights.adapters import ALL_LINEAR, Lora, adapted_modules, adapter_shapes
from megarl.weights.name_map import hf_shapes
from tests.unit.composed_configs import composed_values
from tests.unit.model_shapes import model_shape

KEY = "actor_rollout_ref.model"
DENSE, MIXTURE = model_shape(), replace(model_shape("Qwen3MoeForCausalLM"), dense_layers=())
OFF = ModelConfig(None, "pretrained", "bfloat16", True, False, 0, 16, (ALL_LINEAR,))
TWO = Layout(2, fsdp=2)


def _lora(*targets: str) -> Lora:
    return Lora(4, 8, targets)


def test_what_is_said_of_adapters_does_nothing_where_there_are_none() -> None:
    assert not list(adapters_are_asked_for(KEY, OFF))
    assert not list(adapters_are_asked_for(KEY, replace(OFF, lora_rank=8, lora_alpha=32, target_modules=("q_proj",))))
    problems = list(adapters_are_asked_for(KEY, replace(OFF, lora_alpha=32, target_modules=("q_proj",))))
    assert [p.key for p in problems] == [f"{KEY}.lora_alpha", f"{KEY}.target_modules"]
    assert all(f"only where {KEY}.lora_rank is above 0" in p.allowed for p in problems)


def test_adapters_name_a_module_at_least() -> None:
    (empty,) = adapters_have_modules(KEY, replace(OFF, lora_rank=8, target_modules=()))
    assert empty.key == f"{KEY}.target_modules"
    assert not list(adapters_have_modules(KEY, OFF))
    assert not list(adapters_have_modules(KEY, replace(OFF, lora_rank=8)))


@pytest.mark.parametrize("strict", [False, True])
def test_a_file_with_adapters_that_are_switched_off_runs_and_says_what_does_nothing(strict: bool) -> None:
    changes = {f"{KEY}.lora_alpha": 32, f"{KEY}.path": "Qwen/Qwen2.5-7B-Instruct", "trainer.strict": strict}
    values = composed_values("ppo_trainer", **changes)
    if strict:
        with pytest.raises(ConfigError, match="lora_alpha"):
            check_ppo(values, files_may_be_missing=True)
        return
    checked = check_ppo(values, files_may_be_missing=True)
    assert [problem.key for problem in without_effect(checked, checked.num_steps)] == [f"{KEY}.lora_alpha"]


@pytest.mark.parametrize("key", ["lora_rank", "lora_alpha", "target_modules"])
def test_adapters_of_a_critic_are_refused_with_the_reason(key: str) -> None:
    values = composed_values("ppo_trainer", **{f"{KEY}.path": "Qwen/Qwen2.5-7B-Instruct", f"critic.model.{key}": 8})
    with pytest.raises(ConfigError, match=rf"critic\.model\.{key}.* isn't there yet: adapters of a critic") as error:
        check_ppo(values, files_may_be_missing=True)
    assert [problem.key for problem in error.value.problems] == [f"critic.model.{key}"]


def test_adapters_are_refused_on_megatron() -> None:
    on_fsdp, on_megatron = (
        replace(role_on(layout, DENSE, training=TRAINING), lora=_lora(ALL_LINEAR)) for layout in (TWO, Layout(2))
    )
    assert not list(adapters_are_on_fsdp(on_fsdp))
    (problem,) = adapters_are_on_fsdp(on_megatron)
    assert problem.key.endswith(".lora_rank") and problem.value == 4 and "Megatron" in problem.allowed


@pytest.mark.parametrize("target", ["q_prj", "proj", "lm_head", "embed_tokens", "input_layernorm", "mlp"])
def test_a_target_is_a_linear_module_of_the_layers(target: str) -> None:
    role = replace(role_on(TWO, DENSE, training=TRAINING), lora=_lora("q_proj", target))
    (problem,) = adapted_modules_exist(role)
    assert problem.value == target and "q_proj" in problem.allowed and ALL_LINEAR in problem.allowed


def test_neither_experts_nor_their_router_have_adapters() -> None:
    ends = {name.rpartition(".")[2] for name in adapted_modules(MIXTURE, (ALL_LINEAR,))}
    assert ends == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_a_target_is_the_end_of_a_name_between_dots() -> None:
    whole = adapted_modules(DENSE, ("model.layers.1.mlp.up_proj", "self_attn.q_proj"))
    assert set(whole) == {"model.layers.1.mlp.up_proj"} | {
        f"model.layers.{i}.self_attn.q_proj" for i in range(DENSE.num_layers)
    }
    assert all(size == hf_shapes(DENSE)[f"{name}.weight"] for name, size in whole.items())


def test_only_adapters_have_gradients_and_moments_in_the_plan() -> None:
    role = role_on(Layout(1, fsdp=1), DENSE, training=TRAINING, dtype="bfloat16")
    base = static_of(replace(role, training=None), 0).parameters
    lora = _lora(ALL_LINEAR)
    numel = sum(rows * columns for rows, columns in adapter_shapes(DENSE, lora).values())
    found = static_of(replace(role, lora=lora), 0)
    assert found.parameters == base + numel * FP32_BYTES
    assert (found.gradients, found.optimizer) == (numel * FP32_BYTES, 2 * numel * FP32_BYTES)
