from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from megarl.checks import axes as megatron_rules
from megarl.checks.axes import (
    a_precision_aware_optimizer_has_its_place,
    a_tensor_split_fits,
    an_optimizer_on_the_host_is_split_and_stays,
    axes_divide_the_ranks,
    buckets_are_reduced_early,
    chunks_take_turns_on_a_pipeline,
    late_parameters_are_those_of_buckets,
    moments_of_16_bits_are_those_of_an_optimizer_that_has_them,
    overridden_fields_exist_and_are_free,
    recomputation_has_layers_to_pick,
    recomputation_is_complete,
    the_model_fits_its_axes,
    what_is_said_of_experts_has_some,
)
from megarl.checks.transformer_fields import OURS, transformer_fields
from megarl.config.router_losses import router_losses_are_added
from megarl.config.schema import TrainedMegatronConfig
from megarl.errors import Problem
from megarl.parallel.layout import split_layers
from tests.unit.composed_configs import ppo_config
from tests.unit.model_shapes import model_shape

ACTOR = "actor_rollout_ref.actor.megatron"
TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
VPP, EP, ETP = (
    "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
PRECISE = "use_precision_aware_optimizer"
BALANCING, BALANCE = "moe_router_load_balancing_type", "moe_aux_loss_coeff"
DENSE, MOE = model_shape(), replace(model_shape("Qwen3MoeForCausalLM"), num_layers=8)
EIGHT_LAYERS, FIVE_LAYERS = replace(DENSE, num_layers=8), replace(DENSE, num_layers=5)


def _megatron(**changes: object) -> TrainedMegatronConfig:
    return ppo_config(**{f"{ACTOR}.{name}": value for name, value in changes.items()}).actor_rollout_ref.actor.megatron


def _full(method: str, num_layers: int, **axes: object) -> TrainedMegatronConfig:
    changes = {"granularity": "full", "method": method, "num_layers": num_layers}
    return _megatron(**axes, **{f"recompute.{name}": value for name, value in changes.items()})


BROKEN: list[tuple[Callable[..., Any], Callable[[], tuple[object, ...]], list[str], str]] = [
    (axes_divide_the_ranks, lambda: (_megatron(**{TP: 3}), 8), [f"m.{TP}"], "products that do: 1, 2, 4, 8"),
    (axes_divide_the_ranks, lambda: (_megatron(**{TP: 4, PP: 4}), 8), [f"m.{TP} x m.{PP}"], "divide the 8 ranks"),
    (axes_divide_the_ranks, lambda: (_megatron(**{CP: 16}), 8), [f"m.{CP}"], "divide the 8 ranks"),
    (axes_divide_the_ranks, lambda: (_megatron(**{EP: 3}), 8), [f"m.{EP}"], "divide the 8 ranks"),
    # Experts are split by TP too, unless ETP says otherwise.
    (axes_divide_the_ranks, lambda: (_megatron(**{TP: 2, EP: 8}), 8), [f"m.{TP} x m.{EP}"], "divide the 8 ranks"),
    (axes_divide_the_ranks, lambda: (_megatron(**{EP: 4, ETP: 4}), 8), [f"m.{ETP} x m.{EP}"], "divide the 8 ranks"),
    (chunks_take_turns_on_a_pipeline, lambda: (_megatron(**{VPP: 2}),), [f"m.{VPP}"], f"where m.{PP} is 1"),
    (
        recomputation_is_complete,
        lambda: (_megatron(**{"recompute.granularity": "full", "recompute.method": "block"}).recompute,),
        ["m.recompute.num_layers"],
        "must be set where granularity is full",
    ),
    (
        recomputation_has_layers_to_pick,
        lambda: (_megatron(**{"recompute.num_layers": 1}).recompute,),
        ["m.recompute.num_layers"],
        "has no effect where m.recompute.granularity is null",
    ),
    (
        an_optimizer_on_the_host_is_split_and_stays,
        lambda: (_megatron(optimizer_on_host=True, use_distributed_optimizer=False),),
        ["m.use_distributed_optimizer"],
        "must be true where m.optimizer_on_host is true",
    ),
    (
        an_optimizer_on_the_host_is_split_and_stays,
        lambda: (_megatron(optimizer_on_host=True, optimizer_offload=True),),
        ["m.optimizer_offload"],
        "contradicts m.optimizer_on_host=true",
    ),
    (
        late_parameters_are_those_of_buckets,
        lambda: (_megatron(overlap_param_gather=True, overlap_grad_reduce=True, use_distributed_optimizer=False),),
        ["m.use_distributed_optimizer"],
        "must be true where m.overlap_param_gather is true",
    ),
    (
        late_parameters_are_those_of_buckets,
        lambda: (_megatron(overlap_param_gather=True),),
        ["m.overlap_grad_reduce"],
        "which goes by its buckets",
    ),
    (
        buckets_are_reduced_early,
        lambda: (_megatron(ddp_bucket_size=1000),),
        ["m.ddp_bucket_size"],
        "has an effect only where m.overlap_grad_reduce is true",
    ),
    (
        moments_of_16_bits_are_those_of_an_optimizer_that_has_them,
        lambda: (_megatron(exp_avg_dtype="bfloat16"),),
        ["m.exp_avg_dtype"],
        "has an effect only where m.use_precision_aware_optimizer is true",
    ),
    (
        a_precision_aware_optimizer_has_its_place,
        lambda: (_megatron(**{PRECISE: True, "use_distributed_optimizer": False}), "bfloat16"),
        ["m.use_distributed_optimizer"],
        "must be true where m.use_precision_aware_optimizer is true",
    ),
    (
        a_precision_aware_optimizer_has_its_place,
        lambda: (_megatron(**{PRECISE: True, "optimizer_on_host": True}), "bfloat16"),
        ["m.optimizer_on_host"],
        "contradicts m.use_precision_aware_optimizer=true",
    ),
    (
        a_precision_aware_optimizer_has_its_place,
        lambda: (_megatron(**{PRECISE: True}), "float32"),
        [f"m.{PRECISE}"],
        "steps a bfloat16 model alone; this one is float32",
    ),
    (
        overridden_fields_exist_and_are_free,
        lambda: (_megatron(override_transformer_config={BALANCING: "aux_loss", BALANCE: 0.01}),),
        [f"m.override_transformer_config.{BALANCING}"],
        "must be none or seq_aux_loss",
    ),
    (
        router_losses_are_added,
        lambda: ({BALANCE: 0.01},),
        [f"m.{BALANCE}"],
        f"has no effect where {BALANCING} is none",
    ),
    (
        router_losses_are_added,
        lambda: ({BALANCING: "seq_aux_loss"},),
        [f"m.{BALANCING}"],
        f"has no effect where {BALANCE} is 0",
    ),
    (
        overridden_fields_exist_and_are_free,
        lambda: (_megatron(override_transformer_config={"moe_z_loss_coeff": -1.0}),),
        ["m.override_transformer_config.moe_z_loss_coeff"],
        "must be a number, and not negative",
    ),
    (
        what_is_said_of_experts_has_some,
        lambda: (DENSE, _megatron(override_transformer_config={"moe_z_loss_coeff": 0.001})),
        ["m.override_transformer_config.moe_z_loss_coeff"],
        "the model has no experts",
    ),
    (
        overridden_fields_exist_and_are_free,
        lambda: (_megatron(override_transformer_config={"recompute_num_layers": 2}),),
        ["m.override_transformer_config.recompute_num_layers"],
        "is decided by megarl from other keys",
    ),
    (
        overridden_fields_exist_and_are_free,
        lambda: (_megatron(override_transformer_config={"moe_aux_loss_cof": 2}),),
        ["m.override_transformer_config.moe_aux_loss_cof"],
        "is no field of the installed megatron-core's TransformerConfig",
    ),
    (
        overridden_fields_exist_and_are_free,
        lambda: (_megatron(override_transformer_config={"tp_comm_overlap": True}),),
        ["m.override_transformer_config.tp_comm_overlap"],
        "its buffers have one fixed size, and micro-batches have any number of tokens",
    ),
    (the_model_fits_its_axes, lambda: (DENSE, _megatron(**{TP: 8})), [f"m.{TP}"], "the model's 4 attention heads"),
    (the_model_fits_its_axes, lambda: (DENSE, _megatron(**{PP: 4})), [f"m.{PP}"], "the model's 3 layers"),
    (the_model_fits_its_axes, lambda: (DENSE, _megatron(**{PP: 2, VPP: 2})), [f"m.{VPP}"], "the model's 3 layers"),
    (what_is_said_of_experts_has_some, lambda: (DENSE, _megatron(**{EP: 2})), [f"m.{EP}"], "model has no experts"),
    (
        what_is_said_of_experts_has_some,
        lambda: (DENSE, _megatron(**{ETP: 2})),
        [f"m.{ETP}"],
        "the model has no experts",
    ),
    (the_model_fits_its_axes, lambda: (MOE, _megatron(**{EP: 3})), [f"m.{EP}"], "the model's 4 experts"),
    (
        the_model_fits_its_axes,
        lambda: (MOE, _megatron(override_transformer_config={"moe_enable_deepep": True})),
        ["m.override_transformer_config.moe_enable_deepep"],
        "and there is one",
    ),
    (the_model_fits_its_axes, lambda: (MOE, _megatron(**{ETP: 8})), [f"m.{ETP}"], "an expert's feed-forward size"),
    (
        the_model_fits_its_axes,
        lambda: (MOE, _megatron(**{TP: 2, "sequence_parallel": False})),
        ["m.sequence_parallel"],
        "megatron demands it",
    ),
    (
        the_model_fits_its_axes,
        lambda: (EIGHT_LAYERS, _full("uniform", 3, **{PP: 2})),
        ["m.recompute.num_layers"],
        "must divide the layers of every pipeline stage (4)",
    ),
    (
        the_model_fits_its_axes,
        lambda: (FIVE_LAYERS, _full("uniform", 2, **{PP: 2})),
        ["m.recompute.num_layers"],
        "every pipeline stage (2, 3)",
    ),
    (
        the_model_fits_its_axes,
        lambda: (EIGHT_LAYERS, _full("uniform", 4, **{PP: 2, VPP: 2})),
        ["m.recompute.num_layers"],
        "every pipeline stage (2)",
    ),
    (
        the_model_fits_its_axes,
        lambda: (FIVE_LAYERS, _full("block", 4, **{PP: 2})),
        ["m.recompute.num_layers"],
        "at most the 3 layers of a pipeline stage",
    ),
    (a_tensor_split_fits, lambda: (replace(DENSE, ffn_size=6), 4), ["m"], "the model's 6 feed-forward size"),
]


@pytest.mark.parametrize(("rule", "arguments", "keys", "said"), BROKEN)
def test_a_broken_rule_of_axes_names_its_key_and_what_is_allowed(
    rule: Callable[..., Any], arguments: Callable[[], tuple[object, ...]], keys: list[str], said: str
) -> None:
    first, *rest = arguments()
    problems: list[Problem] = list(rule("m", first, *rest))
    assert [p.key for p in problems] == keys
    assert said in problems[0].allowed


@pytest.mark.parametrize(("axes", "value"), [({TP: 3}, 3), ({TP: 4, PP: 4}, "4 x 4 = 16")])
def test_a_product_of_axes_is_shown_where_there_is_one(axes: Mapping[str, object], value: object) -> None:
    [problem] = axes_divide_the_ranks("m", _megatron(**axes), 8)
    assert problem.value == value


def test_every_rule_of_axes_is_broken_here() -> None:
    rules = [
        name
        for name, rule in vars(megatron_rules).items()
        if getattr(rule, "__annotations__", {}).get("return") == "Problems" and not name.startswith("_")
    ]
    assert {*rules, "router_losses_are_added"} == {rule.__name__ for rule, *_ in BROKEN}


@pytest.mark.parametrize(
    ("num_layers", "recompute", "axes"),
    [
        (8, ("uniform", 1), {}),
        (8, ("uniform", 4), {PP: 2}),
        (8, ("uniform", 2), {PP: 2, VPP: 2}),
        (5, ("uniform", 1), {PP: 2}),
        (5, ("block", 3), {PP: 2}),
        (8, ("block", 8), {}),
    ],
)
def test_recomputed_layers_that_fill_their_stages_pass(
    num_layers: int, recompute: tuple[str, int], axes: Mapping[str, object]
) -> None:
    shape = replace(DENSE, num_layers=num_layers)
    assert list(the_model_fits_its_axes("m", shape, _full(*recompute, **axes))) == []


def test_more_stages_than_layers_is_said_once_and_not_again_of_what_is_recomputed() -> None:
    problems = list(the_model_fits_its_axes("m", DENSE, _full("uniform", 2, **{PP: 4})))
    assert [p.key for p in problems] == [f"m.{PP}"]


def test_the_stages_that_the_rule_counts_are_those_of_the_layout() -> None:
    for num_layers in range(1, 12):
        for pp in range(1, num_layers + 1):
            sizes = {len(layers) for layers in split_layers(num_layers, pp)}
            for run in range(1, num_layers + 1):
                config = replace(_EMPTY, pipeline_model_parallel_size=pp, recompute=replace(_RUNS, num_layers=run))
                broken = list(the_model_fits_its_axes("m", replace(DENSE, num_layers=num_layers), config))
                assert bool(broken) == any(size % run for size in sizes)


_EMPTY, _RUNS = _megatron(), _full("uniform", 1).recompute


def test_a_field_of_megatrons_own_may_be_overridden() -> None:
    fields = transformer_fields()
    assert fields is not None
    free = sorted(set(fields) - set(OURS))
    config = replace(_EMPTY, override_transformer_config=dict.fromkeys(free))
    assert len(free) > 50 and list(overridden_fields_exist_and_are_free("m", config)) == []
