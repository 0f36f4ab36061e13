"""Padded, packed and packed by tokens: what an actor update computes, keeps and takes on the lengths of GSM8K.

    OMP_NUM_THREADS=1 python benchmarks/packing.py --source FOLDER_OF_GSM8K [--rollouts 64] [--repetitions 5] [--write]

FOLDER_OF_GSM8K has test.jsonl or train.jsonl. A rollout is a question and its worked answer, in tokens of the small
tokenizer that megarl.data.gsm8k trains. The ways take turns in one process with the same model, rollouts and optimizer
step. --write puts the table into docs/performance.md.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from page import write_measured

from megarl.batching.balance import Cost, TokenBudget, pass_cost
from megarl.batching.plan import Rows, micro_batches, plan_update, split_rows

if TYPE_CHECKING:
    from megarl.train.megatron.backend import MegatronBackend
    from megarl.types import PolicyBatch
    from megarl.weights.model_shape import ModelShape

MICRO_BATCH_SIZE, NUM_RANKS = 8, 8


@dataclass(frozen=True)
class Way:
    """How the rollouts of an optimizer step are laid out. budget: tokens of a micro-batch; None counts rollouts."""

    name: str
    packed: bool
    budget: TokenBudget | None = None

    def parts(self, lengths: Sequence[int], num_ranks: int) -> tuple[tuple[Rows, ...], ...]:
        """Return the micro-batches of every data-parallel rank."""
        if self.budget is None:
            shares = split_rows(len(lengths), num_ranks)
            return tuple(micro_batches(rows, MICRO_BATCH_SIZE) for rows in shares)
        [step] = plan_update(len(lengths), len(lengths), 1, num_ranks, 1, None, self.budget.over(lengths))
        return step.micro_batches_by_rank


@dataclass(frozen=True)
class Measured:
    """Of one optimizer step on one rank."""

    num_micro_batches: int
    computed: float
    busiest: float
    saved_bytes: int
    seconds: float


def measure(
    ways: Sequence[Way], actors: dict[bool, MegatronBackend], batch: PolicyBatch, repetitions: int
) -> dict[str, Measured]:
    """Let the ways take turns; the first turn warms up. actors: by whether they pack."""
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    lengths = batch.lengths_B.tolist()
    for turn in range(repetitions + 1):
        for way in ways:
            [micros] = way.parts(lengths, 1)
            start = time.perf_counter()
            update(actors[way.packed], batch, micros)
            if turn:
                seconds[way.name].append(time.perf_counter() - start)
    found = {}
    for way in ways:
        [micros] = way.parts(lengths, 1)
        actor = actors[way.packed]
        computed = sum(micro.tokens.numel() for micro in actor.pack(batch, micros))
        saved = max(saved_bytes(actor, batch, rows) for rows in micros)
        cost = cost_of(actor.role.shape)
        loads = [sum(cost(lengths[row]) for micro in part for row in micro) for part in way.parts(lengths, NUM_RANKS)]
        found[way.name] = Measured(
            len(micros),
            computed / sum(lengths),
            max(loads) / statistics.mean(loads),
            saved,
            statistics.median(seconds[way.name]),
        )
    return found


def update(actor: MegatronBackend, batch: PolicyBatch, micros: Sequence[Rows]) -> None:
    """Take one optimizer step on all rollouts."""
    from megarl.algorithm.aggregate import mini_batch_totals
    from megarl.algorithm.loss_specs import PolicyLossSpec
    from megarl.algorithm.policy_loss import PolicyLossSettings
    from megarl.train.actor import Actor
    from megarl.train.work import OptimizerStep, UpdateWork

    loss = PolicyLossSpec(PolicyLossSettings(), "token-mean", kl_coef=None, kl_type="kl", temperature=1.0)
    step = OptimizerStep(tuple(micros), *mini_batch_totals(batch.mask_BS.sum(-1)))
    Actor(actor).update(UpdateWork("actor", batch, (step,), loss))


def saved_bytes(actor: MegatronBackend, batch: PolicyBatch, rows: Rows) -> int:
    """Return the bytes that the forward pass of one micro-batch keeps for its backward pass, parameters left out."""
    import torch

    resident = {parameter.untyped_storage()._cdata for parameter in actor.model.own_parameters()}
    saved: dict[int, torch.UntypedStorage] = {}  # held, so that no address comes twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in resident:
            saved[storage._cdata] = storage
        return tensor

    (micro,), model = actor.pack(batch, [rows]), actor.model
    model.set_training(True)
    with model.resident(), model.groups.active(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        output = model.output(micro, model.forward(model.module, micro))
        scores = output.logprobs(1.0)
        total = sum(storage.nbytes() for storage in saved.values())
    del scores
    return total


def cost_of(shape: ModelShape) -> Cost:
    """Return what a sequence costs a model."""
    return pass_cost(shape.active_parameters, shape.num_layers * shape.num_heads * shape.head_dim)


def gsm8k_rollouts(source: Path, count: int) -> tuple[PolicyBatch, ModelShape]:
    """Return the first questions of ``source`` with their answers as rollouts, and the shape of a small model."""
    import tempfile

    import torch

    from megarl.batching.pack import sequences_to_batch
    from megarl.data.gsm8k import find_splits, read_questions, train_tokenizer
    from megarl.data.tiny_qwen3 import tiny_qwen3
    from megarl.types import PolicyBatch
    from megarl.weights.model_shape import read_model_shape

    questions = read_questions(next(iter(find_splits(source).values())))
    tokenizer = train_tokenizer(questions)
    prompts = [tokenizer.encode(f"<|user|>{q.prompt}<|end|><|assistant|>") for q in questions[:count]]
    answers = [tokenizer.encode(f"{q.response}<|end|>") for q in questions[:count]]
    batch = sequences_to_batch(
        [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)],
        [[False] * len(prompt) + [True] * len(answer) for prompt, answer in zip(prompts, answers, strict=True)],
    )
    torch.manual_seed(0)
    mask_BS = batch.mask_BS.float()
    old_BS, advantages_BS = -5.0 * mask_BS, torch.randn(mask_BS.shape) * mask_BS
    with tempfile.TemporaryDirectory() as folder:
        tiny_qwen3(tokenizer, max_position_embeddings=2048).save_pretrained(folder)
        shape = read_model_shape(folder)
    return PolicyBatch(**vars(batch), old_logprobs_BS=old_BS, advantages_BS=advantages_BS), shape


def join_alone() -> None:
    """Make this process the only rank of a world."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    from megarl.ranks.join import join_ranks

    join_ranks()


def build_actor(shape: ModelShape, *, packed: bool) -> MegatronBackend:
    """Return the backend of a fresh actor on this rank."""
    from megarl.parallel.layout import Layout
    from megarl.verify.roles import TRAINING, role_on
    from megarl.verify.work import backend_on_rank

    return backend_on_rank(role_on(Layout(1), shape, training=TRAINING, packed=packed))


def table(found: dict[str, Measured], lengths: Sequence[int]) -> str:
    """Return what was measured as a table."""
    lines = [
        f"{len(lengths)} rollouts of {min(lengths)} to {max(lengths)} tokens, {sum(lengths):,} in all:",
        "",
        "| way | micro-batches | tokens computed / real | kept by the largest micro-batch | update |"
        f" busiest of {NUM_RANKS} ranks / mean |",
        "|---|---|---|---|---|---|",
    ]
    for name, m in found.items():
        kept = f"{m.saved_bytes / 2**20:.0f} MiB"
        lines.append(
            f"| {name} | {m.num_micro_batches} | {m.computed:.2f} | {kept} | {m.seconds:.2f} s | {m.busiest:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write the table where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--rollouts", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    join_alone()
    batch, shape = gsm8k_rollouts(arguments.source, arguments.rollouts)
    lengths, cost = batch.lengths_B.tolist(), cost_of(shape)
    # As much as the longest micro-batch by count, packed: what a device with room for that one takes.
    largest = max(sum(lengths[row] for row in rows) for rows in micro_batches(range(len(lengths)), MICRO_BATCH_SIZE))
    ways = (
        Way(f"padded, {MICRO_BATCH_SIZE} rollouts", packed=False),
        Way(f"packed, {MICRO_BATCH_SIZE} rollouts", packed=True),
        Way(f"packed, {largest:,} tokens", packed=True, budget=TokenBudget(largest, cost)),
        Way(f"packed, {largest // 2:,} tokens", packed=True, budget=TokenBudget(largest // 2, cost)),
    )
    actors = {packed: build_actor(shape, packed=packed) for packed in (False, True)}
    text = table(measure(ways, actors, batch, arguments.repetitions), lengths)
    print(text)
    if arguments.write:
        write_measured("packing", text)


if __name__ == "__main__":
    main()
