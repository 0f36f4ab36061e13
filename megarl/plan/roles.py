"""The models of a run as the plan sees them: shape, layout, what is trained, and where each waits between uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megarl.batching.plan import BatchPlan
from megarl.checks.algorithm import needs_critic, needs_reference, needs_reward_model
from megarl.checks.passes import (
    actor_scoring,
    actor_update,
    critic_scoring,
    critic_update,
    ref_scoring,
    reward_scoring,
)
from megarl.checks.rules import num_ranks
from megarl.config.schema import PPOConfig, RecomputeConfig, TrainedMegatronConfig
from megarl.parallel.layout import Layout, layout_of
from megarl.plan.activations import Pass
from megarl.plan.static import StaticBytes, static_bytes
from megarl.weights.model_shape import ModelShape

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Role:
    """One model of a run. megatron: its section of the config, of a trained model where ``trained``.

    update_tokens, score_tokens: of the longest micro-batch on one data-parallel rank, in an update and in a pass that
    only scores. num_micro_batches: of one optimizer step, 1 where nothing is trained. fused_head: its log-probs
    compute the logits themselves.
    """

    name: str
    shape: ModelShape
    layout: Layout
    dtype_bytes: int
    update_tokens: int
    score_tokens: int
    num_micro_batches: int
    param_offload: bool
    grad_offload: bool = False
    optimizer_offload: bool = False
    optimizer_on_host: bool = False
    adam_bytes: int | None = None
    distributed_optimizer: bool = False
    recompute: RecomputeConfig | None = None
    trained: bool = True
    fused_head: bool = False

    def pass_of(self, tokens: int, fused: bool) -> Pass:
        """Return a forward pass over ``tokens`` tokens."""
        return Pass(self.shape, self.layout, tokens, self.dtype_bytes, fused, self.fused_head)

    def stage(self, rank: int) -> int:
        """Return the pipeline stage of a rank."""
        return self.layout.coordinates(rank).pp

    def static(self, rank: int) -> StaticBytes:
        """Return what a rank holds of this model from start to end."""
        return static_bytes(
            self.shape,
            self.layout,
            rank,
            dtype_bytes=self.dtype_bytes,
            trained=self.trained,
            distributed_optimizer=self.distributed_optimizer,
            optimizer_on_host=self.optimizer_on_host,
            adam_bytes=self.adam_bytes,
        )


def roles_of(
    c: PPOConfig,
    shape: ModelShape,
    critic_shape: ModelShape | None,
    batch: BatchPlan,
    critic_batch: BatchPlan | None,
    reward_shape: ModelShape | None = None,
) -> tuple[Role, ...]:
    """Return the actor, then the reference, the critic and the reward model where the run has them."""
    models, ranks = c.actor_rollout_ref, num_ranks(c)
    dtype_bytes, fused_head = DTYPE_BYTES[models.model.dtype], models.model.use_fused_kernels
    roles = [
        Role(
            "actor",
            shape,
            layout_of(models.actor.megatron, ranks),
            dtype_bytes,
            actor_update(c).most_tokens,
            actor_scoring(c).most_tokens,
            batch.num_accumulation_steps,
            fused_head=fused_head,
            **_waiting(models.actor.megatron),
        )
    ]
    if needs_reference(c):
        ref, layout = models.ref.megatron, layout_of(models.ref.megatron, ranks)
        tokens = ref_scoring(c).most_tokens
        roles.append(
            Role(
                "ref",
                shape,
                layout,
                dtype_bytes,
                tokens,
                tokens,
                1,
                ref.param_offload,
                trained=False,
                fused_head=fused_head,
            )
        )
    if needs_critic(c):
        assert critic_shape is not None and critic_batch is not None
        roles.append(
            Role(
                "critic",
                critic_shape.with_value_head(),
                layout_of(c.critic.megatron, ranks),
                dtype_bytes,
                critic_update(c).most_tokens,
                critic_scoring(c).most_tokens,
                critic_batch.num_accumulation_steps,
                **_waiting(c.critic.megatron),
            )
        )
    if needs_reward_model(c):
        assert reward_shape is not None
        judge, tokens = c.reward.model.megatron, reward_scoring(c).most_tokens
        layout = layout_of(judge, ranks)
        roles.append(
            Role(
                "reward model",
                reward_shape,
                layout,
                dtype_bytes,
                tokens,
                tokens,
                1,
                judge.param_offload,
                trained=False,
            )
        )
    return tuple(roles)


def _waiting(megatron: TrainedMegatronConfig) -> dict[str, Any]:
    return {
        "param_offload": megatron.param_offload,
        "grad_offload": megatron.grad_offload,
        "optimizer_offload": megatron.optimizer_offload,
        "optimizer_on_host": megatron.optimizer_on_host,
        "adam_bytes": _adam_bytes(megatron),
        "distributed_optimizer": megatron.use_distributed_optimizer,
        "recompute": megatron.recompute,
    }


def _adam_bytes(megatron: TrainedMegatronConfig) -> int | None:
    """Return what Transformer Engine's Adam keeps of a parameter: 16 bits of it, and the moments."""
    if not megatron.use_precision_aware_optimizer:
        return None
    return DTYPE_BYTES["bfloat16"] + DTYPE_BYTES[megatron.exp_avg_dtype] + DTYPE_BYTES[megatron.exp_avg_sq_dtype]
