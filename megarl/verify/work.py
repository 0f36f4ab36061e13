"""What every rank does to verify a layout, and what it hands back. Runs in the processes of a pool.

Shape suffixes: B rollouts, S sequence.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.algorithm.aggregate import mini_batch_totals
from megarl.algorithm.policy_loss import PolicyLossSettings
from megarl.batching.plan import micro_batches
from megarl.parallel.environment import platform_name
from megarl.parallel.layout import Layout
from megarl.parallel.platform import Platform
from megarl.ranks.publish import Publisher
from megarl.rollout.vllm import VllmEngine, VllmSpec
from megarl.train.actor import Actor
from megarl.train.megatron.model import ModelSpec
from megarl.train.megatron.optimizer import OptimizerSpec
from megarl.train.policy import Policy
from megarl.train.work import Metrics, OptimizerStep, PolicyLossSpec
from megarl.types import Batch, GenerationRequest, Sampling
from megarl.weights.model_shape import read_model_shape
from megarl.weights.sources import SafetensorsSource

NUM_STEPS = 3
MICRO_BATCH_SIZE = 2
PROMPTS = ((3, 1, 4, 1, 5), (9, 2, 6), (5, 3, 5, 8, 9, 7, 9), (32, 38, 46))
GREEDY = Sampling(temperature=0.0, max_tokens=8, ignore_eos=True)
_MAX_MODEL_LEN = 32
_KV_BLOCK_TOKENS = 128

# An epsilon far above the rounding errors of gradients: Adam would blow them up where the gradient is next to zero.
_OPTIMIZER = OptimizerSpec(
    lr=2e-4,
    min_lr=0.0,
    weight_decay=0.1,
    betas=(0.9, 0.95),
    eps=1e-5,
    clip_grad=1.0,
    schedule="constant",
    warmup_steps=0,
    total_steps=NUM_STEPS,
    use_distributed_optimizer=False,
)

_ROUTER_LOSSES = {
    "moe_router_load_balancing_type": "seq_aux_loss",
    "moe_aux_loss_coeff": 0.1,
    "moe_z_loss_coeff": 0.01,
}


@dataclass(frozen=True)
class Task:
    """A layout to examine. everything, rollouts, temperature: see Reference. out: where it exports to."""

    folder: Path
    layout: Layout
    everything: Batch
    rollouts: Batch
    temperature: float
    out: Path


@dataclass(frozen=True)
class Examined:
    """What a rank found. logprobs: in float32 and bfloat16, of its data-parallel rank's rows, None unless it reports.

    replicated, distributed: metrics of every optimizer step with either optimizer.
    """

    logprobs_BS: Tensor | None
    bf16_logprobs_BS: Tensor | None
    replicated: list[Metrics]
    distributed: list[Metrics]


def examine(task: Task) -> Examined:
    """Score in both dtypes, export what was loaded, and train with both optimizers. Collective."""
    rows, micros = _share(task.layout, task.everything)
    actor = _actor(task, use_distributed_optimizer=False)
    logprobs_BS = actor.logprobs(rows, micros, task.temperature)
    actor.export(task.out, task.folder)
    replicated = _train(actor, task)
    del actor
    distributed = _train(_actor(task, use_distributed_optimizer=True), task)
    in_bf16 = _spec(task.folder, task.layout, torch.bfloat16)
    policy = Policy(in_bf16, SafetensorsSource(task.folder, in_bf16.shape))
    return Examined(logprobs_BS, policy.logprobs(rows, micros, task.temperature), replicated, distributed)


def answer(folder: Path, layout: Layout, engine_tp: int, out: Path) -> list[list[int]]:
    """Export to ``out``, publish to a vLLM of ``engine_tp`` ranks a replica, and return its greedy answers. Collective.

    Processes end with the engine: vLLM keeps the groups of the world it was started in.
    """
    spec = _spec(folder, layout, torch.float32)
    policy = Policy(spec, SafetensorsSource(folder, spec.shape))
    policy.export(out, folder)
    shape = spec.shape
    token_bytes = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * torch.float32.itemsize
    engine = VllmEngine(
        VllmSpec(
            model_folder=str(out),
            dtype="float32",
            tensor_parallel_size=engine_tp,
            max_model_len=_MAX_MODEL_LEN,
            max_num_seqs=len(PROMPTS),
            kv_cache_bytes=max(32 * 2**20, 2 * len(PROMPTS) * _KV_BLOCK_TOKENS * token_bytes),
        )
    )
    Publisher(policy, engine, engine_tp).publish(1)
    requests = [GenerationRequest(_in_vocabulary(prompt, shape.vocab_size), 0) for prompt in PROMPTS]
    answers = [list(rollout.token_ids) for (rollout,) in engine.generate(requests, GREEDY)]
    engine.shutdown()
    return answers


def prompts(vocab_size: int) -> list[tuple[int, ...]]:
    """Return the prompts that engines are asked."""
    return [_in_vocabulary(prompt, vocab_size) for prompt in PROMPTS]


def _in_vocabulary(prompt: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    return tuple(token % vocab_size for token in prompt)


def _spec(folder: Path, layout: Layout, dtype: torch.dtype) -> ModelSpec:
    shape, device = read_model_shape(folder), Platform(platform_name()).device(int(os.environ["LOCAL_RANK"]))
    return ModelSpec(shape, layout, dtype, device, transformer_fields=_ROUTER_LOSSES if shape.num_experts else {})


def _actor(task: Task, *, use_distributed_optimizer: bool) -> Actor:
    spec = _spec(task.folder, task.layout, torch.float32)
    optimizer = replace(_OPTIMIZER, use_distributed_optimizer=use_distributed_optimizer)
    return Actor(spec, SafetensorsSource(task.folder, spec.shape), optimizer)


def _share(layout: Layout, batch: Batch) -> tuple[Batch, tuple[tuple[int, ...], ...]]:
    """Return the rows of this data-parallel rank, which are as many on each, and their micro-batches."""
    count = len(batch) // layout.dp
    first = count * layout.coordinates(dist.get_rank()).dp
    return batch.rows(list(range(first, first + count))), micro_batches(range(count), MICRO_BATCH_SIZE)


def _train(actor: Actor, task: Task) -> list[Metrics]:
    """Take steps of PPO with entropy and KL on the same rollouts; return this rank's share of the metrics."""
    rows, micros = _share(task.layout, task.rollouts)
    step = OptimizerStep(micros, *mini_batch_totals(task.rollouts.mask_BS.sum(-1)))
    loss = PolicyLossSpec(
        PolicyLossSettings(clip_low=0.2, clip_high=0.25, clip_c=1.3),
        loss_agg_mode="token-mean",
        kl_coef=0.1,
        kl_type="low_var_kl",
        temperature=task.temperature,
        entropy_coef=0.05,
    )
    return actor.update(rows, [step] * NUM_STEPS, loss)
