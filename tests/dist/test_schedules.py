"""The plan says in which order a schedule runs its passes, and within 5 % what stages keep at its fullest moment."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest
import torch.distributed as dist
from torch import Tensor

from megarl.batching.pack import sequences_to_batch
from megarl.parallel.layout import Layout
from megarl.plan.activations import chunk_bytes, pass_of, recompute_of, recomputed_bytes
from megarl.plan.pipeline import ChunkPass, chunk_passes, moments
from megarl.roles import Role
from megarl.train.actor import Actor
from megarl.train.megatron.backend import MegatronBackend
from megarl.types import Sequences
from megarl.verify.pool import RankPool
from megarl.verify.roles import TRAINING, role_on
from megarl.verify.work import backend_on_rank, update
from megarl.weights.model_shape import read_model_shape
from tests.dist.parity import SFT, ask
from tests.dist.saved_bytes import HeldBytes
from tests.dist.test_activations import EXPERTS, RECOMPUTE, SIZES, TOLERANCE

NUM_MICRO_BATCHES = (1, 2, 3, 4, 5)
ROWS_EACH, LENGTH = 2, 48
MIXED = {"architectures": ["Qwen2MoeForCausalLM"], **EXPERTS, "shared_expert_intermediate_size": 80}
EIGHT_LAYERS = {
    "dense": {"architectures": ["Qwen3ForCausalLM"]},
    "first_dense": MIXED | {"mlp_only_layers": [0]},
    "some_dense": MIXED | {"mlp_only_layers": [0, 3, 6, 7]},
}
PIPELINES = {
    "pp2": Layout(2, pp=2),
    "pp2xvpp2": Layout(2, pp=2, vpp=2),
    "pp2xvpp4": Layout(2, pp=2, vpp=4),
    "pp4": Layout(4, pp=4),
    "pp4xvpp2": Layout(4, pp=4, vpp=2),
    "tp2xpp2xvpp2+sp": Layout(4, tp=2, pp=2, vpp=2, sequence_parallel=True),
}
ONE_LAYER_EACH = ("pp2xvpp4", "pp4xvpp2")
QUICK = {
    ("dense", "pp2xvpp2", "float32", "nothing"),
    ("some_dense", "pp2", "float32", "nothing"),
    ("first_dense", "pp2", "float32", "block_2"),
}


@dataclass(frozen=True)
class Update:
    """An optimizer step on one rank, and what the plan says of it. peak_bytes: most that was kept at once."""

    passes: list[ChunkPass]
    planned_passes: list[ChunkPass]
    peak_bytes: int
    planned_bytes: int


def _updates(role: Role, batch: Sequences) -> list[Update]:
    """Take an optimizer step on the first micro-batches of ``batch``, as many as each of NUM_MICRO_BATCHES."""
    backend, size = backend_on_rank(role), role.scoring.micro_batch_size
    return [_update(backend, batch.rows(range(count * size))) for count in NUM_MICRO_BATCHES]


def _update(backend: MegatronBackend, batch: Sequences) -> Update:
    held, passes = HeldBytes(backend.model.own_parameters()), list[ChunkPass]()
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
        for chunk, module in enumerate(backend.model.chunks)
    ]
    with held.counting():
        update(Actor(backend), batch, SFT)
    for hook in hooks:
        hook.remove()
    assert held.now == 0, held.now
    role, stage = backend.role, backend.role.layout.coordinates(dist.get_rank()).pp
    num_micro_batches = len(batch) // role.scoring.micro_batch_size
    tokens = int(batch.lengths_B.sum()) // num_micro_batches
    planned = list(chunk_passes(role.layout, stage, num_micro_batches))
    return Update(passes, planned, held.peak, _planned_bytes(role, stage, tokens, num_micro_batches))


def _planned_bytes(role: Role, stage: int, tokens: int, num_micro_batches: int) -> int:
    p, recompute, chunks = pass_of(role, tokens, fused=False), recompute_of(role), range(role.layout.vpp)
    kept = [chunk_bytes(p, stage, chunk, recompute) for chunk in chunks]
    again = [recomputed_bytes(p, stage, chunk, recompute) for chunk in chunks]
    return max(m.bytes_of(kept) + again[m.chunk] for m in moments(role.layout, stage, num_micro_batches))


@pytest.mark.parametrize(
    ("model", "layout", "dtype", "recompute"),
    [
        pytest.param(*case, id="-".join(case), marks=() if case in QUICK else pytest.mark.long)
        for case in product(EIGHT_LAYERS, PIPELINES, ("float32", "bfloat16"), RECOMPUTE)
        if case[1] not in ONE_LAYER_EACH or not case[3].endswith("_2")  # more layers than there are: refused
    ],
)
def test_a_schedule_runs_as_planned_and_keeps_the_planned_bytes_at_its_fullest_moment(
    ranks: RankPool, tmp_path: Path, model: str, layout: str, dtype: str, recompute: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SIZES | {"num_hidden_layers": 8} | EIGHT_LAYERS[model]))
    role = role_on(
        PIPELINES[layout],
        read_model_shape(tmp_path),
        dtype=dtype,
        training=TRAINING,
        micro_batch_size=ROWS_EACH,
        recompute=RECOMPUTE[recompute],
    )
    rows = ROWS_EACH * max(NUM_MICRO_BATCHES)
    batch = sequences_to_batch([list(range(1, LENGTH + 1))] * rows, [[False] + [True] * (LENGTH - 1)] * rows)
    for rank in ask(ranks, _updates, role, batch):
        for step in rank:
            assert step.passes == step.planned_passes
            assert step.planned_bytes == pytest.approx(step.peak_bytes, rel=TOLERANCE)
