"""Fields of megatron's TransformerConfig that crash are refused, and fused ones where their kernel isn't installed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megarl.checks.overrides import fused_kernels_are_installed, overridden_fields_can_be_run
from megarl.checks.transformer_fields import OURS, transformer_fields
from megarl.parallel.layout import Layout
from megarl.roles import Role
from tests.unit.small_roles import megatron_of, role_on

CRASHES = {
    "tp_comm_overlap": True,
    "fp8": "hybrid",
    "fp8_param": True,
    "fp4": "e2m1",
    "moe_router_padding_for_quantization": True,
    "delay_wgrad_compute": True,
    "overlap_moe_expert_parallel_comm": True,
    "enable_cuda_graph": True,
    "external_cuda_graph": True,
    "cuda_graph_impl": "local",
    "moe_use_legacy_grouped_gemm": True,
    "fused_single_qkv_rope": True,
    "use_te_activation_func": True,
    "moe_input_jitter_eps": 0.1,
    "moe_router_force_load_balancing": True,
    "moe_apply_probs_on_input": True,
}
OFF = {"fp8": None, "fp4": None, "cuda_graph_impl": "none", "moe_input_jitter_eps": None}
FUSED = (
    *("apply_rope_fusion", "moe_permute_fusion", "moe_router_fusion", "gradient_accumulation_fusion"),
    "moe_enable_deepep",
)


def _role(**overrides: object) -> Role:
    layout = Layout(1)
    return replace(role_on(layout), backend=replace(megatron_of(layout), override_transformer_config=overrides))


@pytest.mark.parametrize("name", CRASHES)
def test_a_field_that_crashes_is_refused_with_the_reason(name: str) -> None:
    (problem,) = overridden_fields_can_be_run("key", {name: CRASHES[name]})
    assert problem.key == f"key.{name}" and problem.value == CRASHES[name]


@pytest.mark.parametrize("name", CRASHES)
def test_it_is_not_refused_where_it_is_off(name: str) -> None:
    assert not list(overridden_fields_can_be_run("key", {name: OFF.get(name, False)}))


def test_refused_and_fused_fields_are_megatrons_and_not_decided_elsewhere() -> None:
    fields = transformer_fields()
    if fields is None:
        pytest.skip("megatron-core isn't installed")
    assert {*CRASHES, *FUSED} <= fields.keys()
    assert not {*CRASHES, *FUSED} & OURS.keys()


@pytest.mark.parametrize("name", FUSED)
def test_a_fused_field_needs_its_kernel(name: str) -> None:
    (problem,) = fused_kernels_are_installed([_role(**{name: True})], lambda module: None)
    assert problem.key.endswith(f".override_transformer_config.{name}") and "isn't installed" in problem.allowed
    assert not list(fused_kernels_are_installed([_role(**{name: True})], lambda module: module))
    assert not list(fused_kernels_are_installed([_role(**{name: False})], lambda module: None))


def test_gradients_that_are_added_up_in_place_need_apex_and_not_transformer_engine() -> None:
    role = _role(gradient_accumulation_fusion=True, apply_rope_fusion=True)
    (problem,) = fused_kernels_are_installed([role], lambda module: module == "transformer_engine")
    assert problem.key.endswith("gradient_accumulation_fusion") and "Apex" in problem.allowed
