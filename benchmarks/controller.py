"""What the controller sends and how long it takes for a step, at 8 to 1,024 ranks that are simulated.

    python benchmarks/controller.py [--rollouts 512] [--tokens 5120] [--write]

It runs the controller's own code (megarl/controller/role_on_ranks.py, megarl/launchers/parcels.py) over a group whose
ranks answer at once, for the calls of a GRPO step with a reference: two passes of log-probs and an update. Sent bytes
are what leaves the controller; ``a copy a rank`` is what would leave it if each rank were sent its own. --write
puts the table into docs/performance.md.
"""

from __future__ import annotations

import argparse
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from page import write_measured

from megarl.algorithm.loss_specs import PolicyLossSpec
from megarl.algorithm.policy_loss import PolicyLossSettings
from megarl.batching.size import rollouts_a_pass
from megarl.config.build import build_config
from megarl.config.docs import default_values
from megarl.config.schema import TrainedMegatronConfig
from megarl.controller.role_on_ranks import RoleOnRanks
from megarl.launchers.parcels import packed, parcels_of
from megarl.monitor.timing import Stopwatch
from megarl.parallel.layout import layout_of
from megarl.ranks.worker import Worker
from megarl.roles import ModelFacts, Role, Training
from megarl.train.work import ScoreWork, Updated, UpdateWork
from megarl.types import PolicyBatch
from megarl.weights.model_facts.shipped import shipped_config
from megarl.weights.model_shape import parse_model_shape

MODEL = "Qwen/Qwen3-235B-A22B"
NUM_RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
A, T = TypeVar("A"), TypeVar("T")


@dataclass(frozen=True)
class Answers(Generic[T]):
    """Answers that are there."""

    found: list[T]

    def result(self) -> list[T]:
        """Return them."""
        return self.found


class SimulatedRanks:
    """A WorkerGroup without ranks: it packs arguments as the others do, and answers with numbers of no meaning."""

    def __init__(self, world_size: int, reporting: Sequence[int]) -> None:
        self.world_size, self.reporting = world_size, frozenset(reporting)
        self.sent_bytes = self.bytes_of_a_copy_a_rank = self.received_bytes = 0

    def submit(self, verb: Callable[[Worker, A], T], arguments: Sequence[A]) -> Answers[Any]:
        """Pack the arguments, count their bytes, and answer for the ranks that report."""
        parcels = parcels_of(arguments)
        for content, takers in zip(packed(parcels), parcels.takers, strict=True):
            self.sent_bytes += len(content)
            self.bytes_of_a_copy_a_rank += len(content) * len(takers)
        return Answers(
            [self._answer(arguments[rank]) if rank in self.reporting else None for rank in range(self.world_size)]
        )

    def _answer(self, work: object) -> object:
        """Return the answer of a rank after it has travelled."""
        if isinstance(work, ScoreWork):
            answer: object = torch.zeros(work.sequences.tokens_BS.shape)
        else:
            assert isinstance(work, UpdateWork)
            answer = Updated(tuple({"loss": 0.0, "grad_norm": 0.0, "lr": 0.0} for _ in work.steps))
        content = pickle.dumps(answer, protocol=pickle.HIGHEST_PROTOCOL)
        self.received_bytes += len(content)
        return pickle.loads(content)

    def shutdown(self) -> None:
        """Do nothing."""

    def abort(self) -> None:
        """Do nothing."""


def role_on(num_ranks: int, num_rollouts: int, tokens: int) -> Role:
    """Return the actor on TP8 x PP4 (on fewer stages where there are fewer ranks), data-parallel over the rest."""
    section = default_values("ppo_megatron_trainer")["actor_rollout_ref"]["actor"]["megatron"]
    backend = replace(
        build_config(TrainedMegatronConfig, section),
        tensor_model_parallel_size=8,
        pipeline_model_parallel_size=min(4, num_ranks // 8),
    )
    layout, facts = layout_of(backend, num_ranks), shipped_config(MODEL)
    assert facts is not None
    size = rollouts_a_pass("", 1, tokens, layout)
    training = Training(1e-6, 0.0, 0.0, (0.9, 0.95), 1e-8, 1.0, "constant", 0, 1, num_rollouts // 4, 1, True)
    model = ModelFacts("", MODEL, known_shape=parse_model_shape(facts, MODEL))
    return Role("actor", "", model, backend, layout, "bfloat16", size, size, training)


def batch_of(num_rollouts: int, tokens: int) -> PolicyBatch:
    """Return rollouts of the longest kind, a fifth of each the prompt."""
    shape = (num_rollouts, tokens)
    mask_BS = torch.zeros(shape, dtype=torch.bool)
    mask_BS[:, tokens // 5 :] = True
    columns = [torch.zeros(shape) for _ in range(3)]
    return PolicyBatch(torch.ones(shape, dtype=torch.int64), torch.full((num_rollouts,), tokens), mask_BS, *columns)


def measured(num_ranks: int, batch: PolicyBatch, tokens: int) -> tuple[SimulatedRanks, float]:
    """Return the ranks after the calls of a step, and the seconds that the controller took for them."""
    role = role_on(num_ranks, len(batch), tokens)
    ranks = SimulatedRanks(num_ranks, role.layout.output_ranks())
    loss = PolicyLossSpec(PolicyLossSettings(0.2, 0.2), "token-mean", 0.001, "low_var_kl", 1.0)
    actor = RoleOnRanks(role, ranks, 0, Stopwatch(), loss)
    start_s = time.perf_counter()
    actor.logprobs(batch)
    actor.logprobs(batch)
    actor.update(batch, 1)
    return ranks, time.perf_counter() - start_s


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=5120)
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    batch = batch_of(asked.rollouts, asked.tokens)
    lines = [
        f"{asked.rollouts} rollouts x {asked.tokens:,} tokens, actor on TP8 x PP4, reference alike",
        "",
        "| Ranks | Sent a step, MB | Received, MB | A copy a rank would send, MB | Controller, ms |",
        "|---:|---:|---:|---:|---:|",
    ]
    measured(NUM_RANKS[0], batch, asked.tokens)  # warms up
    for num_ranks in NUM_RANKS:
        ranks, seconds = min((measured(num_ranks, batch, asked.tokens) for _ in range(3)), key=lambda found: found[1])
        lines.append(
            f"| {num_ranks:,} | {ranks.sent_bytes / 1e6:,.0f} | {ranks.received_bytes / 1e6:,.0f} | "
            f"{ranks.bytes_of_a_copy_a_rank / 1e6:,.0f} | {seconds * 1e3:,.0f} |"
        )
    print("\n".join(lines))
    if asked.write:
        write_measured("controller", "\n".join(lines))


if __name__ == "__main__":
    main()
