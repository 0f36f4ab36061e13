"""What the tests of token budgets run on every rank: a controller that each rank is for itself, with a policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megarl.controller.ranks import Ranks, RoleLayout
from torch import Tensor

from megarl.batching.balance import TokenBudget, pass_cost
from megarl.batching.plan import MiniBatch, plan_update
from megarl.batching.zigzag import num_parts
from megarl.parallel.layout import Layout
from megarl.plan.step_time import active_parameters
from megarl.train.actor import Actor
from megarl.train.megatron.model import ModelSpec
from megarl.train.megatron.optimizer import OptimizerSpec
from megarl.train.work import Metrics, OptimizerStep, PolicyLossSpec
from megarl.types import Batch
from megarl.weights.model_shape import read_model_shape
from megarl.weights.sources import SafetensorsSource


@dataclass(frozen=True)
class Cut:
    """How rollouts become micro-batches: by tokens where ``max_tokens`` is given, else by count."""

    mini_batch_size: int
    micro_batch_size: int = 1
    max_tokens: int | None = None


@dataclass(frozen=True)
class Learnt:
    """before, after: log-probs of all rows around the update. metrics: of every optimizer step. plan: of the update."""

    before_BS: Tensor
    after_BS: Tensor
    metrics: list[Metrics]
    plan: tuple[MiniBatch, ...]


class EveryRank:
    """A WorkerGroup in which every rank is controller and worker: all make the same calls and hear all answers."""

    def __init__(self, actor: Actor) -> None:
        self.actor = actor
        self.world_size = dist.get_world_size()

    def call(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Do this rank's share, and return every rank's result."""
        results: list[Any] = [None] * self.world_size
        dist.all_gather_object(results, getattr(self, method)(*arguments[dist.get_rank()]))
        return results

    def logprobs(self, _: str, batch: Batch, micros: Sequence[Sequence[int]], temperature: float) -> Tensor | None:
        """Score this data-parallel rank's rows."""
        return self.actor.logprobs(batch, micros, temperature)

    def update_actor(self, batch: Batch, steps: Sequence[OptimizerStep], loss: PolicyLossSpec) -> list[Metrics]:
        """Take the optimizer steps."""
        return self.actor.update(batch, steps, loss)

    def shutdown(self) -> None:
        """Leave the ranks to the pool."""

    def abort(self) -> None:
        """Leave the ranks to the pool."""


def learn(
    folder: Path, layout: Layout, batch: Batch, cuts: Mapping[str, Cut], loss: PolicyLossSpec, optimizer: OptimizerSpec
) -> dict[str, Learnt]:
    """Score, update and score again with each of ``cuts``, each from the weights of the folder."""
    return {name: _learn(folder, layout, batch, cut, loss, optimizer) for name, cut in cuts.items()}


def _learn(
    folder: Path, layout: Layout, batch: Batch, cut: Cut, loss: PolicyLossSpec, optimizer: OptimizerSpec
) -> Learnt:
    shape = read_model_shape(folder)
    spec = ModelSpec(shape, layout, torch.float32, torch.device("cpu"))
    actor = Actor(spec, SafetensorsSource(folder, shape), optimizer)
    cost = pass_cost(active_parameters(shape), shape.num_layers * shape.num_heads * shape.head_dim)
    budget = None if cut.max_tokens is None else TokenBudget(cut.max_tokens, cost, 1, num_parts(layout.cp))
    ranks = Ranks(EveryRank(actor), {"actor": RoleLayout(layout, cut.micro_batch_size, budget, budget)})
    spread = budget.over(batch.lengths_B.tolist()) if budget else None
    plan = plan_update(len(batch), cut.mini_batch_size, cut.micro_batch_size, layout.dp, 1, 5, spread)
    before_BS = ranks.logprobs("actor", batch, loss.temperature)
    metrics = ranks.update_actor(batch, plan, loss)
    return Learnt(before_BS, ranks.logprobs("actor", batch, loss.temperature), metrics, plan)
