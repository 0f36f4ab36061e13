"""The roles that layouts are verified with: of any model on any layout, with the defaults of a run. Loads no torch."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from megarl.batching.size import rollouts_a_pass, tokens_a_pass
from megarl.config.build import build_config
from megarl.config.defaults import default_values
from megarl.config.schema import TrainedFsdpConfig, TrainedMegatronConfig
from megarl.parallel.layout import Layout
from megarl.roles import ModelFacts, Role, Training, residency_of
from megarl.weights.any_model import read_shape
from megarl.weights.model_shape import ModelShape
from megarl.weights.name_map import hf_shapes

# An epsilon far above the rounding errors of gradients: Adam would blow them up where the gradient is next to zero.
TRAINING = Training(
    lr=2e-4,
    min_lr=0.0,
    weight_decay=0.1,
    betas=(0.9, 0.95),
    eps=1e-5,
    clip_grad=1.0,
    schedule="constant",
    warmup_steps=0,
    total_steps=10,
)


_SCALED_FOR = 500_000


def training_of(shape: ModelShape) -> Training:
    """Return TRAINING, with steps that change the losses of a larger model as little as those of a tiny one.

    The gradient's norm is clipped to one, so that its elements shrink with the root of their number. A step of Adam
    moves each by about the learning rate: the loss changes by that times the sum of their sizes, which grows with it.
    """
    parameters = sum(math.prod(size) for size in hf_shapes(shape).values())
    scale = min(1.0, math.sqrt(_SCALED_FOR / parameters))
    return replace(TRAINING, lr=scale * TRAINING.lr, eps=scale * TRAINING.eps)


def role_on(
    layout: Layout,
    model: Path | ModelShape,
    name: str = "actor",
    *,
    dtype: str = "float32",
    training: Training | None = None,
    micro_batch_size: int = 2,
    max_tokens: int | None = None,
    packed: bool = True,
    fused_head: bool = False,
    **section: Any,
) -> Role:
    """Return a Role of the model in a folder, or of a shape whose weights are drawn.

    name: as in a run; a critic gets a value head. training: None for a frozen role. max_tokens: of a micro-batch on a
    device, in place of a count of rollouts. section: what differs from the defaults of the backend's section.
    """
    folder = model if isinstance(model, Path) else None
    shape = read_shape(model) if isinstance(model, Path) else model
    facts = ModelFacts(name, None, "pretrained" if folder else "random", shape, str(folder) if folder else None)
    if max_tokens is None:
        batching = rollouts_a_pass(name, micro_batch_size, shape.max_positions, layout)
    else:
        batching = tokens_a_pass(name, max_tokens, shape.max_positions, layout)
    role = Role(
        name,
        name,
        facts.with_value_head() if name == "critic" else facts,
        fsdp_section(layout) if layout.is_fsdp else megatron_section(layout),
        layout,
        dtype,
        batching,
        batching if training else None,
        training,
        packed=packed,
        fused_head=fused_head,
    )
    return with_section(role, **section)


def with_section(role: Role, **changes: Any) -> Role:
    """Return the role with keys of its backend's section changed, and with the residency that follows from them."""
    section = replace(role.backend, **changes)
    return replace(role, backend=section, residency=residency_of(section))


def megatron_section(layout: Layout) -> TrainedMegatronConfig:
    """Return Megatron's section with the axes of ``layout``: the inverse of ``layout_of``."""
    return replace(
        _default_section(),
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        sequence_parallel=layout.sequence_parallel,
    )


def fsdp_section(layout: Layout) -> TrainedFsdpConfig:
    """Return FSDP's section with the axes of ``layout``."""
    values = default_values("ppo_trainer")["actor_rollout_ref"]["actor"]["fsdp_config"]
    section = build_config(TrainedFsdpConfig, values)
    return replace(section, fsdp_size=layout.fsdp, ulysses_sequence_parallel_size=layout.cp)


@cache
def _default_section() -> TrainedMegatronConfig:
    values = default_values("ppo_megatron_trainer")["actor_rollout_ref"]["actor"]["megatron"]
    return build_config(TrainedMegatronConfig, values)
