"""What stages keep while a real pipeline schedule runs, and in which order it runs the passes of their chunks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.batching.plan import micro_batches
from megarl.config.schema import RecomputeConfig
from megarl.parallel.layout import Layout
from megarl.plan.activations import Pass, chunk_bytes, recomputed_bytes
from megarl.plan.pipeline import ChunkPass, chunk_passes, moments
from megarl.train.actor import Actor
from megarl.train.megatron.model import ModelSpec
from megarl.train.megatron.optimizer import OptimizerSpec
from megarl.train.work import OptimizerStep
from megarl.types import Batch
from megarl.weights.model_shape import read_model_shape
from megarl.weights.sources import RandomSource
from tests.dist.saved_bytes import HeldBytes


@dataclass(frozen=True)
class Update:
    """An optimizer step on one rank, and what the plan says of it. peak_bytes: most that was kept at once."""

    passes: list[ChunkPass]
    planned_passes: list[ChunkPass]
    peak_bytes: int
    planned_bytes: int


def updates(
    folder: Path,
    layout: Layout,
    dtype: torch.dtype,
    recompute: RecomputeConfig | None,
    optimizer: OptimizerSpec,
    batch: Batch,
    rows_each: int,
    counts: Sequence[int],
) -> list[Update]:
    """Take an optimizer step on the first micro-batches of ``batch``, of ``rows_each`` rows, as many as each count."""
    shape = read_model_shape(folder)
    spec = ModelSpec(shape, layout, dtype, torch.device("cpu"), recompute=recompute)
    actor = Actor(spec, RandomSource(shape, 0), optimizer)
    return [_update(actor, batch.rows(list(range(count * rows_each))), rows_each) for count in counts]


def _update(actor: Actor, batch: Batch, rows_each: int) -> Update:
    held, passes = HeldBytes(actor.own_parameters()), list[ChunkPass]()
    done: Counter[tuple[int, bool]] = Counter()

    def note(chunk: int, is_forward: bool) -> None:
        passes.append(ChunkPass(chunk, done[chunk, is_forward], is_forward))
        done[chunk, is_forward] += 1

    def watch(chunk: int, output: Tensor) -> None:
        note(chunk, is_forward=True)
        held.hold(output, output)  # the schedule does, until its backward pass
        output.register_hook(lambda _: note(chunk, is_forward=False))

    hooks = [
        module.register_forward_hook(lambda _, __, output, chunk=chunk: watch(chunk, output))
        for chunk, module in enumerate(actor.chunks)
    ]
    micros, tokens_B = micro_batches(range(len(batch)), rows_each), batch.mask_BS.sum(-1)
    step = OptimizerStep(micros, int(tokens_B.sum()), len(batch))
    with held.counting():
        actor.update_sft(batch, [step])
    for hook in hooks:
        hook.remove()
    assert held.now == 0, held.now
    layout, stage = actor.spec.layout, actor.spec.layout.coordinates(dist.get_rank()).pp
    planned = list(chunk_passes(layout, stage, len(micros)))
    tokens = int(batch.lengths_B.sum()) // len(micros)
    return Update(passes, planned, held.peak, _planned_bytes(actor.spec, stage, tokens, len(micros)))


def _planned_bytes(spec: ModelSpec, stage: int, tokens: int, num_micro_batches: int) -> int:
    p, chunks = Pass(spec.shape, spec.layout, tokens, spec.dtype.itemsize, fused=False), range(spec.layout.vpp)
    kept = [chunk_bytes(p, stage, chunk, spec.recompute) for chunk in chunks]
    again = [recomputed_bytes(p, stage, chunk, spec.recompute) for chunk in chunks]
    return max(m.bytes_of(kept) + again[m.chunk] for m in moments(spec.layout, stage, num_micro_batches))
