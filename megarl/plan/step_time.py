"""A rough time of one step, to compare layouts with each other: work over speed, and bytes over bandwidth.

It knows nothing of kernels, stragglers or the lengths that a policy will choose, so it ranks and doesn't promise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megarl.batching.plan import BatchPlan
from megarl.plan.activations import recompute_of
from megarl.plan.devices import CPU, Device
from megarl.plan.fsdp import copies_bytes, exchanged_bytes
from megarl.plan.memory import Engine
from megarl.plan.static import static_of
from megarl.plan.topology import bubble_share
from megarl.roles import Role

TRAINING_EFFICIENCY = 0.4
DECODE_EFFICIENCY = 0.6
DECODE_STEP_S = 0.008
ASSUMED = (
    f"{TRAINING_EFFICIENCY:.0%} of the device's matrix speed in training passes, {DECODE_EFFICIENCY:.0%} of its memory "
    f"bandwidth and {DECODE_STEP_S * 1000:g} ms a token in generation, links at full speed without overlap, every "
    "prompt and response as long as the configuration allows"
)


@dataclass(frozen=True)
class StepTime:
    """Seconds of the parts of a step."""

    generate: float
    score: float
    update: float
    move: float

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return self.generate + self.score + self.update + self.move


def step_time(
    roles: Sequence[Role],
    batches: Mapping[str, BatchPlan],
    engine: Engine,
    engine_tp: int,
    device: Device,
    *,
    ranks_per_node: int,
    num_rollouts: int,
    num_scored_rollouts: int,
    max_prompt: int,
    max_response: int,
    max_num_seqs: int,
    epochs: int,
) -> StepTime:
    """Return the estimate of a step of ``num_rollouts`` rollouts, so many of which need a pass of old log-probs."""
    actor, ranks = roles[0], roles[0].layout.world_size
    tokens = num_rollouts * (max_prompt + max_response)
    score = update = move = 0.0
    for role in roles:
        scored = num_scored_rollouts / num_rollouts if role is actor else 1
        score += scored * _pass_seconds(role, tokens, device, ranks_per_node, 1)
        if role.layout.is_fsdp:
            share = scored * num_rollouts / role.layout.dp
            num_passes = math.ceil(share / role.scoring.micro_batch_size)
            score += num_passes * exchanged_bytes(role).gathered / _parts_link(role, device, ranks_per_node)
        if role.is_trained:
            recompute = recompute_of(role)
            passes = 4 if recompute is not None and recompute.granularity == "full" else 3
            waits = 1 - bubble_share(role.layout, batches[role.name].num_accumulation_steps)
            update += epochs * _pass_seconds(role, tokens, device, ranks_per_node, passes) / waits
            if role.fused_head:  # its backward pass computes the logits again
                update += epochs * _flops_seconds(role.shape.hidden_size * role.shape.vocab_size, tokens, device, ranks)
            if role.layout.is_fsdp:
                update += _sharded_seconds(role, batches[role.name], device, ranks_per_node)
        static, stay = static_of(role, 0), role.residency
        carried = 2 * static.parameters * stay.param_offload + 2 * static.optimizer * stay.optimizer_offload
        carried += epochs * static.parameters * 3 * stay.optimizer_on_host  # gradients to the host, parameters back
        move += carried / device.host_link_bytes_per_s
    link = device.link_bytes_per_s if ranks <= ranks_per_node else device.inter_node_bytes_per_s
    move += engine.weights_bytes * (1 - 1 / ranks) / link

    sequences = -(-num_rollouts // (ranks // engine_tp))
    at_once = max(1, min(max_num_seqs, sequences, engine.num_cached_tokens // (max_prompt + max_response)))
    cached = at_once * (max_prompt + max_response / 2) * engine.bytes_per_token
    read = (engine.weights_bytes + cached) / (DECODE_EFFICIENCY * device.memory_bytes_per_s)
    waves = -(-sequences // at_once)
    latency = DECODE_STEP_S if device.name != CPU else 10 * DECODE_STEP_S
    generate = waves * max_response * (read + latency * (1 + 0.1 * (engine_tp - 1)))
    generate += _flops_seconds(actor.shape.active_parameters, num_rollouts * max_prompt, device, ranks)
    return StepTime(generate, score, update, move)


def _flops_seconds(parameters: int, tokens: int, device: Device, ranks: int) -> float:
    return 2 * parameters * tokens / (ranks * TRAINING_EFFICIENCY * device.bf16_flops_per_s)


def _sharded_seconds(role: Role, batch: BatchPlan, device: Device, ranks_per_node: int) -> float:
    """Return the seconds that ranks on FSDP gather parameters and reduce gradients in all optimizer steps of a step."""
    once = exchanged_bytes(role)
    a_micro_batch = (once.gathered + once.gathered_again + once.reduced) / _parts_link(role, device, ranks_per_node)
    crosses = role.layout.world_size > ranks_per_node
    a_step = copies_bytes(role) / (device.inter_node_bytes_per_s if crosses else device.link_bytes_per_s)
    return batch.num_optimizer_steps * (batch.num_accumulation_steps * a_micro_batch + a_step)


def _parts_link(role: Role, device: Device, ranks_per_node: int) -> float:
    """Return the speed between ranks that have one copy of a model between them."""
    return device.link_bytes_per_s if role.layout.fsdp <= ranks_per_node else device.inter_node_bytes_per_s


def _pass_seconds(role: Role, tokens: int, device: Device, ranks_per_node: int, passes: int) -> float:
    """Return the seconds of as many forward passes as ``passes``, with what ranks exchange in them."""
    layout, shape = role.layout, role.shape
    seconds = passes * _flops_seconds(shape.active_parameters, tokens, device, layout.world_size)
    mine = tokens / (layout.dp * layout.cp) * shape.num_layers / layout.pp
    row = shape.hidden_size * role.dtype_bytes
    tensor_link = device.link_bytes_per_s if layout.tp <= ranks_per_node else device.inter_node_bytes_per_s
    exchanged = 4 * mine * row * (layout.tp - 1) / layout.tp / tensor_link
    if layout.cp > 1 and layout.is_fsdp:  # queries, keys, values and what comes of them, of which others get most
        swapped = 2 * (shape.num_heads + shape.num_kv_heads) * shape.head_dim * role.dtype_bytes
        context_link = device.link_bytes_per_s if layout.cp <= ranks_per_node else device.inter_node_bytes_per_s
        exchanged += mine * swapped * (1 - 1 / layout.cp) / context_link
    elif layout.cp > 1:
        exchanged += 2 * mine * row / tensor_link
    if layout.ep > 1:
        spread = layout.ep * layout.expert_tp
        expert_link = device.link_bytes_per_s if spread <= ranks_per_node else device.inter_node_bytes_per_s
        share = mine / (layout.tp if layout.sequence_parallel else 1)
        exchanged += 2 * share * shape.experts_per_token * row * (spread - 1) / spread / expert_link
    return seconds + passes * exchanged
