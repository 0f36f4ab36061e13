"""The controller's view of all ranks: it splits a Batch over data-parallel ranks and merges what they answer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarl.algorithm.aggregate import mini_batch_totals
from megarl.batching.balance import TokenBudget, spread_rows
from megarl.batching.plan import MiniBatch, Rows, micro_batches, split_rows
from megarl.checkpoint.trainer_state import TrainerState
from megarl.launchers.group import WorkerGroup
from megarl.parallel.layout import Layout
from megarl.train.work import Metrics, OptimizerStep, PolicyLossSpec, ValueLossSpec, is_whole
from megarl.types import Batch, GenerationRequest, Rollout, Sampling


@dataclass(frozen=True)
class RoleLayout:
    """Where a role's data-parallel ranks are, and how many rollouts each takes in a pass without training.

    forward_budget, update_budget: where given, micro-batches are filled up to so many tokens instead, in a pass without
    training and in an update.
    """

    layout: Layout
    forward_micro_batch_size: int
    forward_budget: TokenBudget | None = None
    update_budget: TokenBudget | None = None

    def forward_parts(self, lengths: Sequence[int]) -> tuple[tuple[Rows, ...], ...]:
        """Return the micro-batches of every data-parallel rank in a pass without training, as many on each.

        lengths: in tokens, of every row.
        """
        if self.forward_budget is not None:
            return spread_rows(tuple(range(len(lengths))), lengths, self.layout.dp, self.forward_budget)
        size, shares = self.forward_micro_batch_size, split_rows(len(lengths), self.layout.dp)
        most = max(-(-len(rows) // size) for rows in shares)
        return tuple(_cut(rows, size, most) for rows in shares)


class Ranks:
    """All ranks of a run, seen as one. engine_tp: ranks of an engine replica."""

    def __init__(self, group: WorkerGroup, roles: dict[str, RoleLayout], engine_tp: int = 1) -> None:
        self.group, self.roles, self.engine_tp = group, roles, engine_tp
        self.policy_version = -1

    def publish(self) -> int:
        """Publish the actor's weights to the engine; return the new policy_version."""
        self.policy_version += 1
        self._everywhere("publish", self.policy_version)
        return self.policy_version

    def generate(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> list[tuple[Rollout, ...]]:
        """Return the rollouts of every request, in order. Replicas share the requests evenly."""
        num_replicas = self.group.world_size // self.engine_tp
        shares = [[requests[i] for i in rows] for rows in split_rows(len(requests), num_replicas)]
        ranks = range(self.group.world_size)
        results = self.group.call("generate", [(shares[rank // self.engine_tp], sampling) for rank in ranks])
        return [group for replica in range(num_replicas) for group in results[replica * self.engine_tp]]

    def end_generation(self) -> None:
        """Let the engines give their memory back for training."""
        self._everywhere("end_generation")

    def logprobs(self, role: str, batch: Batch, temperature: float) -> Tensor:
        """Return the log-probs [B, S] of the masked tokens under a role's model."""
        return self._score("logprobs", role, batch, lambda local, micros: (role, local, micros, temperature))

    def values(self, batch: Batch) -> Tensor:
        """Return the critic's values [B, S] at the masked tokens."""
        return self._score("values", "critic", batch, lambda local, micros: (local, micros))

    def reward_scores(self, batch: Batch) -> Tensor:
        """Return the reward model's scores [B] of the rollouts."""
        return self._score("reward_scores", "reward model", batch, lambda local, micros: (local, micros))

    def _score(self, method: str, role: str, batch: Batch, arguments: Callable[..., tuple[Any, ...]]) -> Tensor:
        """Split rows over a role's data-parallel ranks, let each score its own, and put them together again."""
        layout = self.roles[role].layout
        # Every data-parallel rank runs as many micro-batches, so that their pipelines stay in step.
        shares = [_local(micros) for micros in self.roles[role].forward_parts(batch.lengths_B.tolist())]
        work = [arguments(batch.rows(rows), micros) for rows, micros in shares]
        results = self.group.call(method, self._by_rank(layout, work))
        scores = torch.cat([results[rank] for rank in layout.output_ranks()])
        merged = torch.empty_like(scores)
        merged[[row for rows, _ in shares for row in rows]] = scores
        return merged

    def update_actor(self, batch: Batch, plan: Sequence[MiniBatch], loss: PolicyLossSpec) -> list[Metrics]:
        """Take the planned optimizer steps; return the metrics of each."""
        return self._update("update_actor", "actor", batch, plan, loss)

    def update_critic(self, batch: Batch, plan: Sequence[MiniBatch], loss: ValueLossSpec) -> list[Metrics]:
        """Take the planned optimizer steps of the critic; return the metrics of each."""
        return self._update("update_critic", "critic", batch, plan, loss)

    def update_sft(self, batch: Batch, plan: Sequence[MiniBatch]) -> list[Metrics]:
        """Take the planned optimizer steps on demonstrations; return the metrics of each."""
        return self._update("update_sft", "actor", batch, plan)

    def evaluate_sft(self, batch: Batch, plan: MiniBatch) -> Metrics:
        """Return the loss on demonstrations without training."""
        layout = self.roles["actor"].layout
        work = [(local, steps[0]) for local, steps in _shares(batch, [plan], layout.dp)]
        results = self.group.call("evaluate_sft", self._by_rank(layout, work))
        return _merge([results[rank] for rank in layout.output_ranks()])

    def export(self, out: Path, state: TrainerState | None = None) -> None:
        """Write the actor as a Hugging Face folder, with the critic in critic/, and the controller's state."""
        self._everywhere("export", str(out), state)

    def _update(self, method: str, role: str, batch: Batch, plan: Sequence[MiniBatch], *extra: object) -> list[Metrics]:
        layout = self.roles[role].layout
        work = [(local, steps, *extra) for local, steps in _shares(batch, plan, layout.dp)]
        results = self.group.call(method, self._by_rank(layout, work))
        return [_merge([results[rank][i] for rank in layout.output_ranks()]) for i in range(len(plan))]

    def _everywhere(self, method: str, *args: object) -> None:
        self.group.call(method, [args] * self.group.world_size)

    def _by_rank(self, layout: Layout, work: Sequence[tuple[object, ...]]) -> list[tuple[object, ...]]:
        """Give every rank the work of its data-parallel rank."""
        return [work[layout.coordinates(rank).dp] for rank in range(self.group.world_size)]


def _cut(rows: Rows, size: int, count: int) -> tuple[Rows, ...]:
    """Cut rows into ``count`` micro-batches: of ``size`` if that gives as many, else near-even."""
    even = micro_batches(rows, size)
    if len(even) == count:
        return even
    return tuple(tuple(rows[i] for i in places) for places in split_rows(len(rows), count))


def _local(micros: Sequence[Rows]) -> tuple[list[int], tuple[Rows, ...]]:
    """Return the rows of micro-batches in order, and the micro-batches in terms of places among those."""
    rows = sorted(row for micro in micros for row in micro)
    place = {row: i for i, row in enumerate(rows)}
    return rows, tuple(tuple(place[row] for row in micro) for micro in micros)


def _shares(batch: Batch, plan: Sequence[MiniBatch], dp_size: int) -> list[tuple[Batch, list[OptimizerStep]]]:
    """Return for every data-parallel rank its rows of ``batch``, and the plan in terms of those."""
    totals = [mini_batch_totals(batch.mask_BS[list(mini.rows)].sum(-1)) for mini in plan]
    shares = []
    for dp in range(dp_size):
        mine = [mini.micro_batches_by_rank[dp] for mini in plan]
        rows = sorted({row for step in mine for micro in step for row in micro})
        local = {row: i for i, row in enumerate(rows)}
        steps = [
            OptimizerStep(tuple(tuple(local[row] for row in micro) for micro in step), *total)
            for step, total in zip(mine, totals, strict=True)
        ]
        shares.append((batch.rows(rows), steps))
    return shares


def _merge(shares: Sequence[Metrics]) -> Metrics:
    """Add up the data-parallel ranks' shares."""
    merged: Metrics = defaultdict(float)
    for share in shares:
        for name, value in share.items():
            merged[name] = value if is_whole(name) else merged[name] + value
    return dict(merged)
