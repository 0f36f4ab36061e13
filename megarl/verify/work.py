"""What every rank does to verify a layout, and what it hands back. Runs in the processes of a pool.

Shape suffixes: B rollouts, S sequence.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.algorithm.aggregate import mini_batch_totals
from megarl.algorithm.loss_specs import LossSpec, PolicyLossSpec
from megarl.algorithm.policy_loss import PolicyLossSettings
from megarl.batching.plan import micro_batches, split_rows
from megarl.parallel.environment import platform_name
from megarl.parallel.layout import EngineLayout
from megarl.parallel.platform import Platform
from megarl.ranks.publish import publisher_of
from megarl.ranks.worker import RoleOnRank, weights_of
from megarl.roles import Role
from megarl.rollout.vllm import VllmEngine, VllmSpec
from megarl.train.actor import Actor
from megarl.train.backend import Backend
from megarl.train.backends import backend_of
from megarl.train.critic import Critic
from megarl.train.reference import Reference
from megarl.train.work import Micros, OptimizerStep, ScoreWork, Updated, UpdateWork
from megarl.types import GenerationRequest, Metrics, PolicyBatch, Sampling, Sequences
from megarl.verify.reference import TEMPERATURE
from megarl.verify.roles import with_section

NUM_STEPS = 3
PROMPTS = ((3, 1, 4, 1, 5), (9, 2, 6), (5, 3, 5, 8, 9, 7, 9), (32, 38, 46))
GREEDY = Sampling(temperature=0.0, max_tokens=8, ignore_eos=True)
_MAX_MODEL_LEN = 32
_KV_BLOCK_TOKENS = 128

PPO = PolicyLossSpec(
    PolicyLossSettings(clip_low=0.2, clip_high=0.25, clip_c=1.3),
    loss_agg_mode="token-mean",
    kl_coef=0.1,
    kl_type="low_var_kl",
    temperature=TEMPERATURE,
    entropy_coef=0.05,
)

S = TypeVar("S", bound=Sequences)


@dataclass(frozen=True)
class Task:
    """A role to examine, which is trained. everything, rollouts: see megarl.verify.reference. out: where to export."""

    role: Role
    everything: Sequences
    rollouts: PolicyBatch
    out: Path


@dataclass(frozen=True)
class Examined:
    """What a rank found. logprobs: in float32 and bfloat16, of its data-parallel rank's rows, None unless it reports.

    replicated, distributed: metrics of every optimizer step with either optimizer of Megatron; with FSDP's own, and
    none.
    """

    logprobs_BS: Tensor | None
    bf16_logprobs_BS: Tensor | None
    replicated: tuple[Metrics, ...]
    distributed: tuple[Metrics, ...]


def examine(task: Task) -> Examined:
    """Score in both dtypes, export what was loaded, and train with both optimizers. Collective."""
    role, rollouts, distributed = task.role, task.rollouts, tuple[Metrics, ...]()
    is_fsdp = role.layout.is_fsdp
    actor = Actor(backend_on_rank(role if is_fsdp else with_section(role, use_distributed_optimizer=False)))
    logprobs_BS = score(actor, task.everything, TEMPERATURE)
    actor.backend.export(task.out)
    replicated = update(actor, rollouts, PPO, NUM_STEPS).metrics
    del actor
    if not is_fsdp:
        actor = Actor(backend_on_rank(with_section(role, use_distributed_optimizer=True)))
        distributed = update(actor, rollouts, PPO, NUM_STEPS).metrics
        del actor
    in_bf16 = Reference(backend_on_rank(replace(role, dtype="bfloat16", training=None)))
    return Examined(logprobs_BS, score(in_bf16, task.everything, TEMPERATURE), replicated, distributed)


def answer(role: Role, engine_tp: int, out: Path) -> list[list[int]]:
    """Export to ``out``, publish to a vLLM of ``engine_tp`` ranks a replica, and return its greedy answers. Collective.

    Processes end with the engine: vLLM keeps the groups of the world it was started in.
    """
    backend, shape = backend_on_rank(role), role.shape
    backend.export(out)
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
    publisher_of(backend, engine, EngineLayout(engine_tp)).publish(1)
    requests = [GenerationRequest(prompt, 0) for prompt in prompts(shape.vocab_size)]
    answers = [list(rollout.token_ids) for (rollout,) in engine.generate(requests, GREEDY)]
    engine.shutdown()
    return answers


def prompts(vocab_size: int) -> list[tuple[int, ...]]:
    """Return the prompts that engines are asked."""
    return [tuple(token % vocab_size for token in prompt) for prompt in PROMPTS]


def backend_on_rank(role: Role) -> Backend:
    """Return this rank's part of a role, with the weights of its folder, or with random ones. Collective."""
    device = Platform(platform_name()).device(int(os.environ["LOCAL_RANK"]))
    return backend_of(role, weights_of(role, seed=0), device)


def score(model: RoleOnRank, sequences: Sequences, temperature: float = 1.0) -> Tensor | None:
    """Return the role's numbers of this data-parallel rank's rows if it reports them, else None. Collective."""
    role = model.backend.role
    rows, micros = share(role, sequences.alone())
    return model.score(ScoreWork(role.name, rows, micros, temperature))


def update(
    model: Actor | Critic, batch: Sequences, loss: LossSpec, num_steps: int = 1, *, is_on_policy: bool = False
) -> Updated:
    """Take optimizer steps, each on the whole of ``batch``; tell this data-parallel rank's share of them. Collective.

    is_on_policy: whether the first step takes its own log-probs for the old ones.
    """
    role = model.backend.role
    rows, micros = share(role, batch)
    step = OptimizerStep(micros, *mini_batch_totals(batch.mask_BS.sum(-1)), len(batch))
    steps = (replace(step, is_on_policy=is_on_policy), *[step] * (num_steps - 1))[:num_steps]
    return model.update(UpdateWork(role.name, rows, steps, loss))


def share(role: Role, batch: S) -> tuple[S, Micros]:
    """Return the rows of this data-parallel rank, which are as many on each, and their micro-batches."""
    assert len(batch) % role.layout.dp == 0
    rows = split_rows(len(batch), role.layout.dp)[role.layout.coordinates(dist.get_rank()).dp]
    return batch.rows(rows), micro_batches(range(len(rows)), role.scoring.micro_batch_size)
