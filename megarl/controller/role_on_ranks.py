"""A role as the controller sees it: it splits rows over data-parallel ranks and merges what they answer."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from megarl.algorithm.aggregate import mini_batch_totals
from megarl.algorithm.loss_specs import LossSpec
from megarl.algorithm.recipe import Update
from megarl.algorithm.seeds import seed_of
from megarl.batching.plan import MiniBatch, Rows
from megarl.launchers.group import WorkerGroup
from megarl.monitor.timing import Stopwatch
from megarl.plan.utilisation import update_flops
from megarl.ranks.worker import Worker
from megarl.roles import Role
from megarl.train.work import SKIPPED, Micros, OptimizerStep, ScoreWork, Updated, UpdateWork, is_whole
from megarl.types import Metrics, PolicyBatch, Sequences

A = TypeVar("A")


@dataclass(frozen=True)
class RoleOnRanks:
    """A role and the group of ranks that hold it.

    seed: of the run. loss: None where nothing is trained. temperature: of the sampling, which log-probs share.
    flops_per_s: of all ranks' devices in bfloat16, None where the share that an update reaches isn't to be told.
    """

    role: Role
    group: WorkerGroup
    seed: int
    stopwatch: Stopwatch
    loss: LossSpec | None = None
    temperature: float = 1.0
    flops_per_s: float | None = None

    def logprobs(
        self, sequences: Sequences, rows: Sequence[int] | None = None, temperature: float | None = None
    ) -> Tensor:
        """Return the log-probs [B, S] of the masked tokens; zero in all rows but ``rows`` where they are given."""
        temperature = self.temperature if temperature is None else temperature
        if rows is None:
            return self._score(sequences, temperature)
        found_BS = torch.zeros(sequences.tokens_BS.shape)
        found_BS[list(rows)] = self._score(sequences.rows(rows), temperature)
        return found_BS

    def values(self, sequences: Sequences) -> Tensor:
        """Return the critic's values [B, S] at the masked tokens."""
        return self._score(sequences)

    def scores(self, sequences: Sequences) -> Tensor:
        """Return the reward model's scores [B] of the rollouts."""
        return self._score(sequences)

    def update(self, batch: Sequences, step: int) -> Update:
        """Take the optimizer steps of a step of the run."""
        assert self.loss is not None
        plan = self.plan(batch, step)
        first_is_on_policy = isinstance(batch, PolicyBatch) and batch.first_is_on_policy
        shares = _shares(batch, plan, self.role.layout.dp, first_is_on_policy)
        works = [UpdateWork(self.role.name, rows, steps, self.loss) for rows, steps, _ in shares]
        started = time.perf_counter()
        answers = self._answers(self.group.submit(Worker.update, self._by_rank(works)).result())
        used = self._utilisation([batch.lengths_B[list(mini.rows)] for mini in plan], time.perf_counter() - started)
        by_step = [_merged([answer.metrics[i] for answer in answers]) for i in range(len(plan))]
        return Update(_means(self.role.name, by_step) | used, _logprobs(batch, shares, answers))

    def _utilisation(self, lengths: Sequence[Tensor], seconds: float) -> Metrics:
        """Return the share of the devices' speed that an update reached, where that is to be told.

        Adapters have another work, and float32 has another speed.
        """
        if self.flops_per_s is None or self.role.lora is not None or self.role.dtype != "bfloat16":
            return {}
        flops = update_flops(self.role.shape, torch.cat(list(lengths)).tolist())
        return {f"{self.role.name}/mfu": flops / seconds / self.flops_per_s}

    def plan(self, batch: Sequences, step: int) -> tuple[MiniBatch, ...]:
        """Return the optimizer steps of a step of the run: they follow from its seed and the lengths of the rows."""
        assert self.role.training is not None
        seed = seed_of(self.seed, self.role.name, step) if self.role.training.shuffle else None
        return self.role.optimizer_steps(batch.lengths_B.tolist(), seed)

    def later_rows(self, sequences: Sequences, step: int) -> list[int]:
        """Return the rows of all mini-batches of a step but the first."""
        return sorted(row for mini in self.plan(sequences, step)[1:] for row in mini.rows)

    def _score(self, sequences: Sequences, temperature: float = 1.0) -> Tensor:
        """Split rows over the data-parallel ranks, let each score its own, and put them together again."""
        # Every data-parallel rank runs as many micro-batches, so that their pipelines stay in step.
        shares = [_local(micros) for micros in self.role.scoring_parts(sequences.lengths_B.tolist())]
        alone = sequences.alone()
        works = [ScoreWork(self.role.name, alone.rows(rows), micros, temperature) for rows, micros in shares]
        with self.stopwatch.timed(f"score_{self.role.name}"):
            answers = self.group.submit(Worker.score, self._by_rank(works)).result()
        scores = torch.cat(self._answers(answers))
        merged = torch.empty_like(scores)
        merged[[row for rows, _ in shares for row in rows]] = scores
        return merged

    def _by_rank(self, works: Sequence[A]) -> list[A]:
        """Return the work of its data-parallel rank for every rank: the same object for all peers."""
        return [works[self.role.layout.coordinates(rank).dp] for rank in range(self.group.world_size)]

    def _answers(self, answers: Sequence[A | None]) -> list[A]:
        """Return the answers of the ranks that report, by data-parallel rank."""
        found = [answers[rank] for rank in self.role.layout.output_ranks()]
        return [answer for answer in found if answer is not None]


def _local(micros: Sequence[Rows]) -> tuple[list[int], Micros]:
    """Return the rows of micro-batches in order, and the micro-batches in terms of places among those."""
    rows = sorted({row for micro in micros for row in micro})
    place = {row: i for i, row in enumerate(rows)}
    return rows, tuple(tuple(place[row] for row in micro) for micro in micros)


def _shares(
    batch: Sequences, plan: Sequence[MiniBatch], dp_size: int, first_is_on_policy: bool
) -> list[tuple[Sequences, tuple[OptimizerStep, ...], list[int]]]:
    """Return the rows of every data-parallel rank, the plan in terms of those, and their indices in ``batch``."""
    totals = [(*mini_batch_totals(batch.mask_BS[list(mini.rows)].sum(-1)), len(mini.rows)) for mini in plan]
    shares = []
    for dp in range(dp_size):
        mine = [mini.micro_batches_by_rank[dp] for mini in plan]
        rows = sorted({row for step in mine for micro in step for row in micro})
        local = {row: i for i, row in enumerate(rows)}
        steps = tuple(
            OptimizerStep(tuple(tuple(local[row] for row in micro) for micro in step), *total)
            for step, total in zip(mine, totals, strict=True)
        )
        if first_is_on_policy:
            steps = (replace(steps[0], is_on_policy=True), *steps[1:])
        shares.append((batch.rows(rows), steps, rows))
    return shares


def _logprobs(
    batch: Sequences, shares: Sequence[tuple[Sequences, tuple[OptimizerStep, ...], list[int]]], answers: list[Updated]
) -> Tensor | None:
    """Return the log-probs [B, S] of the rows that took their own as the old ones, None where none did."""
    parts = [answer.logprobs_BS for answer in answers if answer.logprobs_BS is not None]
    if not parts:
        return None
    logprobs_BS = torch.zeros(batch.tokens_BS.shape)
    for (_, _, rows), part_BS in zip(shares, parts, strict=True):
        logprobs_BS[rows] = part_BS
    return logprobs_BS


def _merged(shares: Sequence[Metrics]) -> Metrics:
    """Return the sums of the data-parallel ranks' shares."""
    merged: Metrics = defaultdict(float)
    for share in shares:
        for name, value in share.items():
            merged[name] = value if is_whole(name) else merged[name] + value
    return dict(merged)


def _means(role: str, updates: Sequence[Metrics]) -> Metrics:
    """Return the means over the optimizer steps of an update that were taken, by names that begin with ``role``.

    Where none was taken, its first step's gradient norm is all that there is to tell.
    """
    taken = [update for update in updates if not update.get(SKIPPED)]
    told = taken or updates[:1]
    names = sorted({name for update in told for name in update} - {SKIPPED})
    means = {f"{role}/{name}": sum(u[name] for u in told) / len(told) for name in names}
    counts = {"num_optimizer_steps": len(taken), SKIPPED: len(updates) - len(taken)}
    return means | {f"{role}/{name}": float(number) for name, number in counts.items()}
