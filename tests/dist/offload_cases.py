"""What the tests of offload run on every rank: the roles of a PPO step, and a Worker of SFT, each as configured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megarl.train.policy import Policy
from tests.dist.parity_cases import Piece, pieces
from torch import Tensor

from megarl.algorithm.aggregate import mini_batch_totals
from megarl.batching.plan import micro_batches
from megarl.config.schema import SFTConfig
from megarl.parallel.layout import Layout
from megarl.parallel.platform import install_platform
from megarl.ranks.spec import RunSpec
from megarl.ranks.worker import Worker
from megarl.train.actor import Actor
from megarl.train.critic import Critic
from megarl.train.megatron.model import Model, ModelSpec
from megarl.train.megatron.optimizer import OptimizerSpec
from megarl.train.work import Metrics, OptimizerStep, PolicyLossSpec, ValueLossSpec
from megarl.types import Batch
from megarl.weights.model_shape import read_model_shape
from megarl.weights.sources import SafetensorsSource

NUM_ROUNDS = 3


@dataclass(frozen=True)
class Held:
    """Bytes of the storages that a role holds on its device, each storage once."""

    parameters: int
    gradients: int
    optimizer: int


@dataclass(frozen=True)
class Round:
    """What was said on the ranks that report results, and the metrics of a step of the actor and of the critic."""

    ref_logprobs_BS: Tensor | None
    old_logprobs_BS: Tensor | None
    values_BS: Tensor | None
    actor: list[Metrics]
    critic: list[Metrics]


@dataclass(frozen=True)
class Lived:
    """rounds: of a run. weights: of the actor afterwards. resting, used: what each role held between and in uses."""

    rounds: list[Round]
    weights: list[Piece]
    resting: dict[str, list[Held]]
    used: dict[str, Held]


@dataclass(frozen=True)
class Run:
    """A run of all roles."""

    folder: Path
    layout: Layout
    dtype: torch.dtype
    batch: Batch
    optimizer: OptimizerSpec
    policy_loss: PolicyLossSpec
    value_loss: ValueLossSpec


def live(run: Run, offloads: tuple[bool, ...]) -> list[Lived]:
    """Live through three rounds once for each choice of offloading everything or nothing."""
    return [_live(run, offload) for offload in offloads]


def _live(run: Run, offload: bool) -> Lived:
    shape, device = read_model_shape(run.folder), torch.device("cpu")
    spec = ModelSpec(shape, run.layout, run.dtype, device, param_offload=offload)
    optimizer = replace(run.optimizer, grad_offload=offload, optimizer_offload=offload)
    source = SafetensorsSource(run.folder, shape)
    valued = replace(spec, shape=shape.with_value_head())
    actor, ref = Actor(spec, source, optimizer), Policy(spec, source)
    critic = Critic(valued, SafetensorsSource(run.folder, valued.shape), optimizer)
    roles: dict[str, Model] = {"actor": actor, "ref": ref, "critic": critic}
    resting = {name: [held(role)] for name, role in roles.items()}
    rounds = []
    for _ in range(NUM_ROUNDS):
        rounds.append(_round(run, actor, ref, critic))
        for name, role in roles.items():
            resting[name].append(held(role))
    used = {}
    for name, role in roles.items():
        with role.optimizer.resident() if isinstance(role, Actor | Critic) else role.resident():
            used[name] = held(role)
    with actor.resident():
        return Lived(rounds, pieces(actor, actor.parameters()), resting, used)


def _round(run: Run, actor: Actor, ref: Policy, critic: Critic) -> Round:
    count = len(run.batch) // run.layout.dp
    first = count * run.layout.coordinates(dist.get_rank()).dp
    rows, micros = run.batch.rows(list(range(first, first + count))), micro_batches(range(count), 2)
    ref_BS, old_BS, values_BS = ref.logprobs(rows, micros, 1.0), actor.logprobs(rows, micros, 1.0), None
    values_BS = critic.values(rows, micros)
    step = OptimizerStep(micros, *mini_batch_totals(run.batch.mask_BS.sum(-1)))
    # Twice: the step after the first finds the state that it left.
    actor_metrics = actor.update(rows, [step, step], run.policy_loss)
    return Round(ref_BS, old_BS, values_BS, actor_metrics, critic.update(rows, [step, step], run.value_loss))


def held(role: Model) -> Held:
    """Measure what a role holds, looking for it where Megatron keeps it."""
    optimizer: Any = role.optimizer if isinstance(role, Actor | Critic) else None
    weights: list[Tensor] = list(role.own_parameters())
    if optimizer is None:
        return Held(_num_bytes(weights, ()), 0, 0)
    buffers = [buffer for ddp in optimizer.chunks for buffer in (*ddp.buffers, *ddp.expert_parallel_buffers)]
    weights += [bucket.param_data for buffer in buffers for bucket in buffer.buckets if bucket.param_data is not None]
    gradients = [bucket.grad_data for buffer in buffers for bucket in buffer.buckets]
    state = [parameter for group in optimizer.inner.param_groups for parameter in group["params"]]
    for inner in optimizer.inner.chained_optimizers:
        state += [t for values in inner.optimizer.state.values() for t in (values["exp_avg"], values["exp_avg_sq"])]
    return Held(_num_bytes(weights, ()), _num_bytes(gradients, ()), _num_bytes(state, weights))


def _num_bytes(tensors: Iterable[Tensor], without: Iterable[Tensor]) -> int:
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().size() for tensor in tensors}
    for tensor in without:
        storages.pop(tensor.untyped_storage()._cdata, None)
    return sum(storages.values())


def work(folder: Path, configs: dict[str, SFTConfig], out: Path, batch: Batch) -> dict[str, list[list[Metrics]]]:
    """Let a Worker of each config take three optimizer steps, with an evaluation after each, and export."""
    metrics = {}
    for name, config in configs.items():
        worker = Worker(RunSpec(config, str(folder), actor_optimizer_steps=10), install_platform())
        layout = worker.actor.spec.layout
        count = len(batch) // layout.dp
        first = count * layout.coordinates(dist.get_rank()).dp
        rows = batch.rows(list(range(first, first + count)))
        step = OptimizerStep(micro_batches(range(count), 2), *mini_batch_totals(batch.mask_BS.sum(-1)))
        metrics[name] = [[*worker.update_sft(rows, [step]), worker.evaluate_sft(rows, step)] for _ in range(3)]
        worker.export(str(out / name), None)
        assert (held(worker.actor) == Held(0, 0, 0)) == (name == "offloaded")
        worker.shutdown()
    return metrics
