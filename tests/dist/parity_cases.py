"""What the parity tests run on every rank: models of Hugging Face folders on any layout, scored and trained.

Shape suffixes: B rollouts, S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor

from megarl.batching.plan import micro_batches
from megarl.config.schema import RecomputeConfig
from megarl.parallel.layout import Layout
from megarl.train.actor import Actor
from megarl.train.megatron.build import unwrap
from megarl.train.megatron.model import ModelSpec
from megarl.train.megatron.optimizer import OptimizerSpec
from megarl.train.policy import Policy
from megarl.train.work import Metrics, OptimizerStep, PolicyLossSpec
from megarl.types import Batch
from megarl.weights.model_shape import read_model_shape
from megarl.weights.name_map import megatron_shards
from megarl.weights.sources import SafetensorsSource

Micros = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Setup:
    """A model on a layout, and how to feed it."""

    folder: Path
    layout: Layout
    packed: bool = True
    dtype: torch.dtype = torch.float32
    micro_batch_size: int = 2
    device: str = "cpu"
    recompute: RecomputeConfig | None = None
    fused_head: bool = False
    transformer_fields: Mapping[str, Any] = field(default_factory=dict)

    def spec(self) -> ModelSpec:
        """Return what megarl builds."""
        return ModelSpec(
            read_model_shape(self.folder),
            self.layout,
            self.dtype,
            torch.device(self.device),
            self.packed,
            recompute=self.recompute,
            fused_head=self.fused_head,
            transformer_fields=self.transformer_fields,
        )

    def model(self) -> Policy:
        """Build a model that only scores."""
        spec = self.spec()
        return Policy(spec, SafetensorsSource(self.folder, spec.shape))

    def actor(self, optimizer: OptimizerSpec) -> Actor:
        """Build a model that trains."""
        spec = self.spec()
        return Actor(spec, SafetensorsSource(self.folder, spec.shape), optimizer)

    def share(self, batch: Batch) -> tuple[Batch, Micros]:
        """Return the rows of this data-parallel rank, which are as many on each, and their micro-batches."""
        count = len(batch) // self.layout.dp
        first = count * self.layout.coordinates(dist.get_rank()).dp
        return batch.rows(list(range(first, first + count))), micro_batches(range(count), self.micro_batch_size)


@dataclass(frozen=True)
class Piece:
    """What a rank holds of the Hugging Face tensor ``name``: rows [start, stop) along ``dim``. No name: padding."""

    name: str | None
    dim: int
    start: int
    stop: int
    values: Tensor


@dataclass(frozen=True)
class Scored:
    """What a rank that reports results says of its data-parallel rank's rows. logits: what predicts token s, at s."""

    logits_BSV: Tensor
    logprobs_BS: Tensor


@dataclass(frozen=True)
class Examined:
    """scored: None on ranks that don't report. gradients, metrics: of one optimizer step of SFT."""

    scored: Scored | None
    gradients: list[Piece]
    metrics: Metrics


@dataclass(frozen=True)
class Trained:
    """metrics: of every optimizer step. weights: afterwards. main_dtypes: of the parameters that Adam steps."""

    metrics: list[Metrics]
    weights: list[Piece]
    main_dtypes: set[torch.dtype]


@dataclass(frozen=True)
class Turn:
    """What a role said when it was its turn: of its optimizer step, and the log-probs as plain numbers."""

    metrics: list[Metrics]
    logprobs_BS: list[list[float]] | None


@dataclass(frozen=True)
class Job:
    """Some optimizer steps on the same batch. loss None is SFT."""

    loss: PolicyLossSpec | None
    optimizer: OptimizerSpec
    packed: bool = True
    micro_batch_size: int = 2
    steps: int = 3


def examine(setup: Setup, batch: Batch, optimizer: OptimizerSpec, temperature: float) -> dict[str, Examined]:
    """Score and differentiate ``batch``, packed and padded."""
    return {
        name: _examine(replace(setup, packed=packed), batch, optimizer, temperature)
        for name, packed in (("packed", True), ("padded", False))
    }


def _examine(setup: Setup, batch: Batch, optimizer: OptimizerSpec, temperature: float) -> Examined:
    actor = setup.actor(optimizer)
    rows, micros = setup.share(batch)
    scored = _score(actor, rows, micros, temperature)
    (metrics,) = actor.update_sft(rows, [step_on(batch, micros)])
    return Examined(scored, pieces(actor, gradients_of(actor)), metrics)


def _score(actor: Actor, batch: Batch, micros: Micros, temperature: float) -> Scored | None:
    """Score every token but the first of each sequence."""
    everything_BS = torch.arange(batch.tokens_BS.shape[1]) < batch.lengths_B[:, None]
    everything_BS[:, 0] = False
    batch = replace(batch, mask_BS=everything_BS)
    shards: list[Tensor] = []
    hook = unwrap(actor.chunks[-1]).register_forward_hook(lambda _, __, output: shards.append(output))
    logprobs_BS = actor.logprobs(batch, micros, temperature)
    hook.remove()
    if not actor.groups.is_last_stage:
        return None
    logits_BSV = _place_logits(actor, batch, micros, shards)
    return None if logprobs_BS is None else Scored(logits_BSV, logprobs_BS)


def _place_logits(actor: Actor, batch: Batch, micros: Micros, shards: list[Tensor]) -> Tensor:
    """Gather each micro-batch's logits from the tensor-parallel ranks, and put them where the tokens are."""
    layout, vocab_size = actor.spec.layout, actor.spec.shape.vocab_size
    logits_BSV = torch.zeros(*batch.tokens_BS.shape, vocab_size)
    # Where chunks take turns, micro-batches without rows follow.
    for rows, shard in zip(micros, shards[: len(micros)], strict=True):
        parts = [torch.empty_like(shard) for _ in range(layout.tp)]
        with actor.groups.active():
            dist.all_gather(parts, shard.contiguous(), group=mpu.get_tensor_model_parallel_group())
        micro = actor.pack(batch, rows)
        own_N = micro.predict_N >= 0
        logits_LV = torch.cat(parts, -1).flatten(0, -2)
        logits_BSV[micro.row_N[own_N], micro.column_N[own_N]] = logits_LV[micro.predict_N[own_N], :vocab_size]
    with actor.groups.active():
        dist.all_reduce(logits_BSV, group=mpu.get_context_parallel_group())
    return logits_BSV


def step_on(batch: Batch, micros: Micros) -> OptimizerStep:
    """Return a step on the whole of ``batch``, of which ``micros`` are this rank's share."""
    tokens_B = batch.mask_BS.sum(-1)
    return OptimizerStep(micros, int(tokens_B.sum()), int((tokens_B > 0).sum()))


def gradients_of(actor: Actor) -> dict[str, Tensor]:
    """Return the gradients by the name map's names: whole only without the distributed optimizer."""
    parameters: Any = actor.own_parameters()
    by_address = {parameter.data_ptr(): parameter.main_grad for parameter in parameters}
    return {name: by_address[parameter.data_ptr()] for name, parameter in actor.parameters().items()}


def pieces(model: Policy, tensors: Mapping[str, Tensor]) -> list[Piece]:
    """Cut tensors, by the name map's names, into ranges of Hugging Face's."""
    found = []
    for shard in megatron_shards(model.spec.shape, model.spec.layout, model.rank):
        parts = tensors[shard.name].detach().split([segment.length for segment in shard.segments], shard.dim)
        for segment, part in zip(shard.segments, parts, strict=True):
            found.append(Piece(segment.tensor, shard.dim, segment.start, segment.stop, part.cpu().clone()))
    return found


def export(setup: Setup, out: Path) -> None:
    """Load a model, and write it as a Hugging Face folder."""
    setup.model().export(out, setup.folder)


def train(setup: Setup, batch: Batch, jobs: Mapping[str, Job]) -> dict[str, Trained]:
    """Do every job, each from the weights of the folder."""
    return {name: _train(setup, batch, job) for name, job in jobs.items()}


def _train(setup: Setup, batch: Batch, job: Job) -> Trained:
    setup = replace(setup, packed=job.packed, micro_batch_size=job.micro_batch_size)
    actor = setup.actor(job.optimizer)
    rows, micros = setup.share(batch)
    steps = [step_on(batch, micros)] * job.steps
    metrics = actor.update_sft(rows, steps) if job.loss is None else actor.update(rows, steps, job.loss)
    dtypes = {parameter.dtype for group in actor.optimizer.inner.param_groups for parameter in group["params"]}
    return Trained(metrics, pieces(actor, actor.parameters()), dtypes)


def take_turns(setups: Mapping[str, Setup], batch: Batch, optimizer: OptimizerSpec) -> dict[str, list[Turn]]:
    """Let the roles of ``setups`` score by turns; the one named ``actor`` takes an optimizer step before it does."""
    models = {role: setup.actor(optimizer) if role == "actor" else setup.model() for role, setup in setups.items()}
    turns: dict[str, list[Turn]] = {role: [] for role in setups}
    for _ in range(3):
        for role, model in models.items():
            rows, micros = setups[role].share(batch)
            metrics = model.update_sft(rows, [step_on(batch, micros)]) if isinstance(model, Actor) else []
            logprobs_BS = model.logprobs(rows, micros, 1.0)
            turns[role].append(Turn(metrics, None if logprobs_BS is None else logprobs_BS.tolist()))
    return turns
