from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.checks.run import check_ppo
from megarl.parallel.layout import Layout
from megarl.plan.devices import device
from megarl.plan.of_run import planned
from megarl.plan.report import plan_text
from megarl.plan.run_plan import RunPlan
from megarl.plan.sizes import StaticBytes
from megarl.plan.static import Parameter, chunk_parameters, static_bytes, static_of
from megarl.weights.model_facts.shipped import shipped_config
from megarl.weights.model_shape import ModelShape, parse_model_shape
from megarl.weights.name_map import hf_shapes, megatron_shards
from tests.unit.composed_configs import composed_values
from tests.unit.model_shapes import layouts_of, model_shape, model_shapes

BF16, FP32 = 2, 4
MAIN_WEIGHT_AND_MOMENTS = 3 * FP32
# Measured: a second.
SECONDS_A_PLAN_MAY_TAKE = 30


def _shape(name: str) -> ModelShape:
    facts = shipped_config(name)
    assert facts is not None
    return parse_model_shape(facts, name)


CASES = [
    ("Qwen/Qwen2.5-7B-Instruct", Layout(8)),
    ("Qwen/Qwen2.5-7B-Instruct", Layout(32, tp=4, pp=4)),
    ("Qwen/Qwen2.5-7B-Instruct", Layout(24, tp=2, pp=3, cp=2)),
    ("Qwen/Qwen3-30B-A3B", Layout(32, ep=8, etp=1)),
    ("Qwen/Qwen3-30B-A3B", Layout(64, tp=4, pp=4, ep=2)),
    ("Qwen/Qwen3-30B-A3B", Layout(48, tp=2, pp=3, ep=8, etp=1)),
    ("Qwen/Qwen3-235B-A22B", Layout(1024, tp=4, pp=8, ep=8, etp=1)),
]
REPLICATED = ("norm.weight", "layernorm.weight", "mlp.gate.weight")


def _copies(shape: ModelShape, layout: Layout, *, of_replicas: bool) -> int:
    """Return the elements of all ranks' parameters, with data-parallel copies where ``of_replicas``."""
    total = 0
    for name, size in hf_shapes(shape).items():
        if ".experts." in name:
            copies = layout.edp if of_replicas else 1
        else:
            copies = layout.tp if name.endswith(REPLICATED) else 1
            copies *= layout.dp * layout.cp if of_replicas else 1
        total += math.prod(size) * copies
    return total


def _all(shape: ModelShape, layout: Layout, *, trained: bool, distributed: bool = True) -> list[StaticBytes]:
    return [
        static_bytes(shape, layout, rank, dtype_bytes=BF16, trained=trained, distributed_optimizer=distributed)
        for rank in range(layout.world_size)
    ]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_ranks_together_hold_as_many_copies_of_every_tensor_as_the_layout_makes(name: str, layout: Layout) -> None:
    shape = _shape(name)
    held = _all(shape, layout, trained=False)
    assert sum(rank.total for rank in held) == BF16 * _copies(shape, layout, of_replicas=True)


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_shares_of_the_distributed_optimizer_add_up_to_every_parameter_once(name: str, layout: Layout) -> None:
    shape = _shape(name)
    stepped = sum(rank.optimizer for rank in _all(shape, layout, trained=True))
    assert stepped == MAIN_WEIGHT_AND_MOMENTS * _copies(shape, layout, of_replicas=False)


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_an_optimizer_that_is_not_distributed_steps_every_copy_and_pads_nothing(name: str, layout: Layout) -> None:
    shape = _shape(name)
    copies = _copies(shape, layout, of_replicas=True)
    held = _all(shape, layout, trained=True, distributed=False)
    assert sum(rank.parameters for rank in held) == BF16 * copies
    assert sum(rank.gradients for rank in held) == FP32 * copies
    assert sum(rank.optimizer for rank in held) == MAIN_WEIGHT_AND_MOMENTS * copies


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_padding_for_the_distributed_optimizer_is_a_trifle_and_the_same_for_gradients(
    name: str, layout: Layout
) -> None:
    shape = _shape(name)
    plain, padded = (_all(shape, layout, trained=True, distributed=distributed) for distributed in (False, True))
    for without, with_padding in zip(plain, padded, strict=True):
        assert without.parameters <= with_padding.parameters <= 1.0001 * without.parameters
        assert with_padding.gradients * BF16 == with_padding.parameters * FP32


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_rank_holds_what_the_name_map_gives_it_whatever_the_model_and_layout(data: st.DataObject) -> None:
    shape = data.draw(model_shapes())
    if shape.num_experts and shape.family != "MixtralForCausalLM":
        dense = tuple(i for i in range(shape.num_layers) if data.draw(st.booleans()))
        shape = replace(shape, dense_layers=dense)
    layout = data.draw(layouts_of(shape))
    for rank in range(layout.world_size):
        numel = sum(math.prod(shard.shape) for shard in megatron_shards(shape, layout, rank))
        assert static_bytes(shape, layout, rank, dtype_bytes=FP32, trained=False).total == FP32 * numel


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from([BF16, FP32]))
def test_shares_of_any_model_add_up_over_replicas(data: st.DataObject, dtype_bytes: int) -> None:
    shape = data.draw(model_shapes())
    layout = data.draw(layouts_of(shape))
    plain, shared = (
        [
            static_bytes(shape, layout, r, dtype_bytes=dtype_bytes, trained=True, distributed_optimizer=distributed)
            for r in range(layout.world_size)
        ]
        for distributed in (False, True)
    )
    if not shape.num_experts:
        assert sum(r.optimizer for r in plain) == layout.dp * sum(r.optimizer for r in shared)
    states = MAIN_WEIGHT_AND_MOMENTS if dtype_bytes == BF16 else 2 * FP32
    assert all(r.optimizer * dtype_bytes == r.parameters * states for r in plain)
    assert all(s.optimizer <= p.optimizer and s.gradients >= p.gradients for s, p in zip(shared, plain, strict=True))


def test_the_parameters_of_a_stage_stand_in_the_order_in_which_megatron_registers_them() -> None:
    """Its modules' own parameters come before those of their parts; the shared expert after all others."""
    shape = replace(model_shape("Qwen2MoeForCausalLM"), num_layers=2, num_experts=2)
    [parameters] = chunk_parameters(shape, Layout(1), 0)
    names = [parameter.name.removesuffix(".weight") for parameter in parameters]
    assert (names[0], names[-2:]) == ("embedding.word_embeddings", ["decoder.final_layernorm", "output_layer"])
    attention = ["input_layernorm", "self_attention.linear_proj", "self_attention.linear_qkv"]
    attention += ["self_attention.linear_qkv.bias", "pre_mlp_layernorm"]
    dense, experts = names[1 : len(attention) + 3], names[len(attention) + 3 : -2]
    assert _in_a_layer(dense) == [*attention, "mlp.linear_fc1", "mlp.linear_fc2"]
    assert _in_a_layer(experts) == [
        *attention,
        "mlp.router",
        *(f"mlp.experts.local_experts.{expert}.linear_fc{number}" for expert in (0, 1) for number in (1, 2)),
        *(f"mlp.shared_experts.{name}" for name in ("gate_weight", "linear_fc1", "linear_fc2")),
    ]
    [normed] = chunk_parameters(replace(model_shape(), num_layers=1), Layout(1), 0)
    attention[3:4] = ["self_attention.q_layernorm", "self_attention.k_layernorm"]
    assert _in_a_layer([p.name.removesuffix(".weight") for p in normed[1:-2]]) == [
        *attention,
        "mlp.linear_fc1",
        "mlp.linear_fc2",
    ]


def _in_a_layer(names: Sequence[str]) -> list[str]:
    return [".".join(name.split(".")[3:]) for name in names]


def _elements_by_replica(bucket: Sequence[Parameter], replicas: int) -> tuple[int, np.ndarray]:
    """Return the size of a bucket, and how many elements of parameters lie in each replica's part of it."""
    places, end = [], 0
    for parameter in bucket:
        start = end + -end % 64
        end = start + parameter.numel
        places.append(np.arange(start, end))
    multiple = math.lcm(replicas, 128)
    size = end + -end % multiple
    return size, np.bincount(np.concatenate(places) // (size // replicas), minlength=replicas)


@pytest.mark.parametrize("layout", [Layout(3), Layout(6, pp=2), Layout(6, cp=3), Layout(12, pp=2, ep=3)], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_a_replica_steps_the_elements_that_lie_in_its_part_of_every_bucket(layout: Layout, tied: bool) -> None:
    """A chunk is one bucket from its last parameter to its first; a tensor that two stages share is one of its own."""
    shape = replace(model_shape("Qwen3MoeForCausalLM", tied=tied), num_layers=4, num_experts=3, vocab_size=300)
    for rank in range(layout.world_size):
        place, expert_place = layout.coordinates(rank), layout.expert_coordinates(rank)
        numel = stepped = 0
        for is_expert in (False, True):
            replicas = layout.edp if is_expert else layout.dp * layout.cp
            replica = expert_place.edp if is_expert else place.cp + layout.cp * place.dp
            for chunk in chunk_parameters(shape, layout, place.pp):
                backward = [p for p in reversed(chunk) if p.is_expert == is_expert]
                is_shared = [tied and layout.pp > 1 and p.name.startswith(("embedding", "output")) for p in backward]
                apart = [[p] for p, shared in zip(backward, is_shared, strict=True) if shared]
                together = [p for p, shared in zip(backward, is_shared, strict=True) if not shared]
                for bucket in (*apart, together):
                    size, elements = _elements_by_replica(bucket, replicas)
                    numel += size
                    stepped += int(elements[replica])
        held = static_bytes(shape, layout, rank, dtype_bytes=BF16, trained=True, distributed_optimizer=True)
        assert held.parameters == BF16 * numel and held.gradients == FP32 * numel
        assert held.optimizer == MAIN_WEIGHT_AND_MOMENTS * stepped


def test_a_plan_of_1024_ranks_of_the_largest_model_takes_seconds() -> None:
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    values = composed_values(
        "ppo_megatron_trainer",
        **{
            "actor_rollout_ref.model.path": "Qwen/Qwen3-235B-A22B",
            "trainer.nnodes": 128,
            "algorithm.adv_estimator": "gae",
            f"{actor}.use_kl_loss": True,
            f"{actor}.ppo_mini_batch_size": 1024,
            f"{actor}.ppo_micro_batch_size_per_gpu": 1,
            f"{actor}.megatron.tensor_model_parallel_size": 4,
            f"{actor}.megatron.pipeline_model_parallel_size": 8,
            f"{actor}.megatron.expert_model_parallel_size": 8,
            f"{actor}.megatron.expert_tensor_parallel_size": 1,
            f"{rollout}.tensor_model_parallel_size": 8,
        },
    )
    start = time.process_time()
    plan = planned(check_ppo(values, files_may_be_missing=True), device("H100"))
    taken_s = time.process_time() - start
    assert plan.num_ranks == 1024 and [role.name for role in plan.roles] == ["actor", "ref", "critic"]
    assert taken_s < SECONDS_A_PLAN_MAY_TAKE


def test_transformer_engines_adam_keeps_half_a_main_parameter_and_moments_of_the_size_asked_for() -> None:
    run = {
        "actor_rollout_ref.model.path": "Qwen/Qwen2.5-7B-Instruct",
        "actor_rollout_ref.actor.use_kl_loss": True,
        "algorithm.adv_estimator": "grpo",
        "actor_rollout_ref.rollout.n": 4,
    }
    precise = {"use_precision_aware_optimizer": True, "exp_avg_dtype": "bfloat16"}
    kept = []
    for settings_of_adam in ({}, precise, precise | {"exp_avg_sq_dtype": "bfloat16"}):
        changes = {f"actor_rollout_ref.actor.megatron.{name}": value for name, value in settings_of_adam.items()}
        values = composed_values("ppo_megatron_trainer", **run, **changes)
        checked = check_ppo(values, files_may_be_missing=True)
        kept.append(static_of(planned(checked, device("h100", 8)).roles[0], 0).optimizer)
    assert [size * 12 / kept[0] for size in kept] == [3 * FP32, BF16 + BF16 + FP32, 3 * BF16]


def test_an_engine_that_spreads_experts_holds_as_many_bytes_and_says_how_many_experts() -> None:
    def plan(spread: int) -> RunPlan:
        rollout = "actor_rollout_ref.rollout"
        changes = {f"{rollout}.tensor_model_parallel_size": 8, f"{rollout}.expert_parallel_size": spread}
        values = composed_values("ppo_megatron_trainer", "experiment=qwen3_30b_a3b_16", **changes)
        return planned(check_ppo(values, files_may_be_missing=True), device("h100", 8))

    parts, spread = plan(1), plan(8)
    assert parts.engine is not None and spread.engine is not None
    assert spread.engine.weights_bytes == parts.engine.weights_bytes, "an eighth of all experts, or of each"
    assert "16 experts of a layer on each of 8 ranks, whole" in plan_text(spread)
    assert "experts of a layer" not in plan_text(parts)


def test_the_plan_says_how_many_buckets_are_reduced_early() -> None:
    def lines(**changes: object) -> list[str]:
        values = composed_values("ppo_megatron_trainer", "experiment=qwen3_235b_4x8", **changes)
        plan = planned(check_ppo(values, files_may_be_missing=True), device("h100", 8))
        return [line for line in plan_text(plan).splitlines() if "during the backward pass" in line]

    section = "actor_rollout_ref.actor.megatron"
    fused = {f"{section}.override_transformer_config": {"moe_permute_fusion": True}}
    values = composed_values("ppo_megatron_trainer", "experiment=qwen3_235b_4x8", **fused)
    assert "  of megatron's own: moe_permute_fusion True" in plan_text(
        planned(check_ppo(values, files_may_be_missing=True), device("h100", 8))
    )
    early = {f"{section}.overlap_grad_reduce": True, f"{section}.overlap_param_gather": True}
    assert lines() == []
    (one_each,) = lines(**early, **{f"{section}.ddp_bucket_size": 1})
    values = composed_values("ppo_megatron_trainer", "experiment=qwen3_235b_4x8")
    actor = planned(check_ppo(values, files_may_be_missing=True), device("h100", 8)).roles[0]
    (chunk,) = chunk_parameters(actor.shape, actor.layout, 0)
    assert f"gradients: {len(chunk)} buckets of the first stage" in one_each
    assert one_each.endswith("parameters are gathered during the next forward pass")
    numel = sum(parameter.numel for parameter in chunk)
    (few,) = lines(**{f"{section}.overlap_grad_reduce": True, f"{section}.ddp_bucket_size": 10 * numel})
    assert "gradients: 2 buckets of the first stage" in few, "one of experts, and one of all else"
    assert "gathered" not in few
