"""Roles on any layout and of any model, made without a config, for tests of what roles hold, move and compute."""

from __future__ import annotations

from megarl.batching.plan import BatchPlan
from megarl.batching.size import rollouts_a_pass
from megarl.config.schema import RecomputeConfig, TrainedMegatronConfig
from megarl.parallel.layout import Layout
from megarl.roles import ModelFacts, Residency, Role, Training
from megarl.weights.model_shape import ModelShape
from tests.unit.model_shapes import model_shape

KEPT = RecomputeConfig(None, None, None)
TRAINING = Training(1e-6, 0.0, 0.01, (0.9, 0.999), 1e-8, 1.0, "constant", 0)


def role_on(
    layout: Layout,
    shape: ModelShape | None = None,
    name: str = "actor",
    *,
    scored: int = 64,
    updated: int = 64,
    training: Training | None = TRAINING,
    residency: Residency | None = None,
    recompute: RecomputeConfig = KEPT,
    fused_head: bool = False,
) -> Role:
    """Return a bfloat16 role with one rollout of ``scored`` or ``updated`` tokens a micro-batch. shape: a small one."""
    return Role(
        name,
        name,
        ModelFacts("model", "model", known_shape=shape or model_shape()),
        megatron_of(layout, recompute),
        layout,
        "bfloat16",
        rollouts_a_pass("scored", 1, scored, layout),
        rollouts_a_pass("updated", 1, updated, layout) if training else None,
        training,
        residency or Residency(),
        fused_head=fused_head,
    )


def megatron_of(layout: Layout, recompute: RecomputeConfig = KEPT) -> TrainedMegatronConfig:
    """Return the section of the config that a layout comes from, with a distributed optimizer and all on the device."""
    return TrainedMegatronConfig(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        sequence_parallel=layout.sequence_parallel,
        param_offload=False,
        override_transformer_config={},
        use_distributed_optimizer=True,
        overlap_grad_reduce=False,
        overlap_param_gather=False,
        ddp_bucket_size=None,
        grad_offload=False,
        optimizer_offload=False,
        optimizer_on_host=False,
        use_precision_aware_optimizer=False,
        exp_avg_dtype="float32",
        exp_avg_sq_dtype="float32",
        recompute=recompute,
    )


def accumulating(num_micro_batches: int) -> BatchPlan:
    """Return a batch of one optimizer step of so many micro-batches."""
    size = num_micro_batches
    return BatchPlan(num_prompts=size, n=1, mini_batch_size=size, micro_batch_size=1, dp_size=1, epochs=1)
