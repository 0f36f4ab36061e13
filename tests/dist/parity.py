"""What every parity test shares: what ranks do with a role, training jobs, and how both are compared with Hugging Face.

Shape suffixes: B rollouts, S sequence, V vocabulary, L positions of a rank, N predicted tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from megarl.algorithm.loss_specs import DemonstrationLossSpec, LossSpec
from megarl.batching.pack import MicroBatch
from megarl.parallel.layout import Layout
from megarl.roles import Role, Training
from megarl.train.actor import Actor
from megarl.train.backend import Backend, Output
from megarl.train.fsdp.backend import FsdpBackend
from megarl.train.megatron.backend import MegatronBackend
from megarl.train.output import ModelOutput
from megarl.train.work import is_whole
from megarl.types import Metrics, PolicyBatch, Sequences
from megarl.verify import work
from megarl.verify.pool import RankPool
from megarl.verify.reference import TEMPERATURE, Reference, hf_logits_BSV, load, with_every_token
from megarl.verify.roles import TRAINING, with_section
from tests.dist import hf_training
from tests.dist.fsdp_inside import keep_gradients

T = TypeVar("T")

TOLERANCE = 2e-5
TRAINING_TOLERANCE = 1e-5
BF16_TOLERANCE = 2e-2

TELLING = ("qwen2-tied", "qwen3-untied")
"""The models of each time: between them they have all that families differ in but Llama's RoPE."""

# Takes a step that leaves gradients and weights as they are.
LOOKING = replace(TRAINING, lr=0.0, clip_grad=1e9)

SFT = DemonstrationLossSpec()
PPO = replace(work.PPO, entropy_coef=0.0)
SEQUENCE_SUM = replace(PPO, loss_agg_mode="seq-mean-token-sum", kl_type="mse")
SEQUENCE_SUM_NORM = replace(PPO, loss_agg_mode="seq-mean-token-sum-norm", max_tokens=20, entropy_coef=0.05)
SEQUENCE_MEAN = replace(PPO, loss_agg_mode="seq-mean-token-mean", kl_coef=None)
REPLICATED: dict[str, Any] = {"use_distributed_optimizer": False}


@dataclass(frozen=True)
class Job:
    """Some optimizer steps on the same batch. section: what differs in the section of the backend."""

    loss: LossSpec
    section: Mapping[str, Any] = field(default_factory=dict)
    packed: bool = True
    micro_batch_size: int = 2
    training: Training = TRAINING
    steps: int = 3


JOBS = {
    "sft": Job(SFT),
    "sft_replicated_optimizer": Job(SFT, REPLICATED),
    "ppo_token_mean": Job(PPO),
    "ppo_sequence_sum_padded": Job(SEQUENCE_SUM, packed=False),
    "ppo_sequence_sum_norm": Job(SEQUENCE_SUM_NORM, REPLICATED, packed=False),
    "ppo_sequence_mean": Job(SEQUENCE_MEAN, REPLICATED),
}
MICRO_BATCH_SIZES = {f"{size}": replace(JOBS["ppo_token_mean"], micro_batch_size=size) for size in (1, 3, 8)}


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

    metrics: tuple[Metrics, ...]
    weights: list[Piece]
    main_dtypes: set[torch.dtype]


Examiner = Callable[..., list[dict[str, Examined]]]
"""By model, layout and sizes of the model: what ranks say, by rank and packing."""
Trainer = Callable[..., list[dict[str, Trained]]]
"""By model, layout, names of JOBS and sizes of the model: what jobs did, by rank and job."""


def ask(ranks: RankPool, function: Callable[..., T], role: Role, *arguments: object) -> list[T]:
    """Run ``function(role, *arguments)`` on all ranks of the role's layout, and return what each returned."""
    return ranks.run(function, role, *arguments, world_size=role.layout.world_size)


def examine(role: Role, batch: Sequences) -> dict[str, Examined]:
    """Score and differentiate ``batch`` on a rank, packed and padded."""
    role = replace(role if role.layout.is_fsdp else with_section(role, **REPLICATED), training=LOOKING)
    return {
        name: _examine(replace(role, packed=packed), batch) for name, packed in (("packed", True), ("padded", False))
    }


def _examine(role: Role, batch: Sequences) -> Examined:
    backend = work.backend_on_rank(role)
    actor, everything = Actor(backend), with_every_token(batch)
    logprobs_BS = work.score(actor, everything, TEMPERATURE)
    logits_BSV = _logits_BSV(backend, everything)
    gradients = keep_gradients(backend) if isinstance(backend, FsdpBackend) else {}
    (metrics,) = work.update(actor, batch, SFT).metrics
    if isinstance(backend, MegatronBackend):
        gradients = gradients_of(backend)
    scored = None if logprobs_BS is None else Scored(logits_BSV, logprobs_BS)
    return Examined(scored, pieces(backend, gradients), metrics)


def _logits_BSV(backend: Backend, sequences: Sequences) -> Tensor:
    """Return the logits of this data-parallel rank's rows, each where the token is that it predicts.

    They are gathered from tensor-parallel and context-parallel ranks; zeros on other stages than the last.
    """
    vocab_size = backend.role.shape.vocab_size
    rows, micros = work.share(backend.role, sequences)
    logits_BSV = torch.zeros(*rows.tokens_BS.shape, vocab_size)
    context_ranks = set()

    def place(micro: MicroBatch, output: Output) -> None:
        assert isinstance(output, ModelOutput)
        context_ranks.add(output.context_ranks)
        parts = [output.tensor.contiguous()]
        if output.vocab_ranks is not None:
            parts = [torch.empty_like(output.tensor) for _ in range(output.vocab_ranks.size())]
            dist.all_gather(parts, output.tensor.contiguous(), group=output.vocab_ranks)
        own_N, logits_LV = micro.predict_N >= 0, torch.cat(parts, -1).flatten(0, -2)
        logits_NV = logits_LV if output.at_predictions else logits_LV[micro.predict_N[own_N]]
        logits_BSV[micro.row_N[own_N], micro.column_N[own_N]] = logits_NV[:, :vocab_size].float()

    backend.forward(backend.pack(rows, micros), place)
    for group in context_ranks - {None}:
        dist.all_reduce(logits_BSV, group=group)
    return logits_BSV


def gradients_of(backend: MegatronBackend) -> dict[str, Tensor]:
    """Return the gradients by the name map's names: whole only without the distributed optimizer."""
    parameters: Any = backend.model.own_parameters()
    by_address = {parameter.data_ptr(): parameter.main_grad for parameter in parameters}
    return {name: by_address[parameter.data_ptr()] for name, parameter in backend.parameters().items()}


def pieces(backend: Backend, tensors: Mapping[str, Tensor]) -> list[Piece]:
    """Cut tensors, by the name map's names, into ranges of Hugging Face's."""
    found = []
    mine = [peers for peers in backend.peers() if dist.get_rank() in peers.ranks]
    for shard in (shard for peers in mine for pattern in peers.patterns for shard in pattern.shards()):
        parts = tensors[shard.name].detach().split([segment.length for segment in shard.segments], shard.dim)
        for segment, part in zip(shard.segments, parts, strict=True):
            found.append(Piece(segment.tensor, shard.dim, segment.start, segment.stop, part.cpu().clone()))
    return found


def export(role: Role, out: Path) -> None:
    """Load a model on the ranks, and write it as a Hugging Face folder."""
    work.backend_on_rank(role).export(out)


def train(role: Role, batch: PolicyBatch, jobs: Mapping[str, Job]) -> dict[str, Trained]:
    """Do every job on a rank, each from the weights of the role's folder."""
    return {name: _train(role, batch, job) for name, job in jobs.items()}


def _train(role: Role, batch: PolicyBatch, job: Job) -> Trained:
    batching = replace(role.scoring, value=job.micro_batch_size)
    role = replace(with_section(role, **job.section), training=job.training, scoring=batching, packed=job.packed)
    backend = work.backend_on_rank(role)
    metrics = work.update(Actor(backend), batch, job.loss, job.steps).metrics
    assert isinstance(backend, MegatronBackend | FsdpBackend) and backend.optimizer is not None
    dtypes = {parameter.dtype for group in backend.optimizer.inner.param_groups for parameter in group["params"]}
    return Trained(metrics, pieces(backend, backend.parameters()), dtypes)


def steps_of(ranks: RankPool, role: Role, batch: PolicyBatch, job: Job) -> list[Metrics]:
    """Let ranks do a job; return the metrics of every optimizer step."""
    return summed([rank["job"].metrics for rank in ask(ranks, train, role, batch, {"job": job})], role.layout)


def summed(results: Sequence[Sequence[Metrics]], layout: Layout) -> list[Metrics]:
    """Add up the shares of the ranks that report."""
    shares = [results[rank] for rank in layout.output_ranks()]
    return [
        {name: value if is_whole(name) else sum(s[name] for s in step) for name, value in step[0].items()}
        for step in zip(*shares, strict=True)
    ]


def assert_pieces_are(pieces: Sequence[Piece], expected: dict[str, Tensor], tolerance: float) -> None:
    """Compare each piece with its part of Hugging Face's tensor, to ``tolerance`` of that one's largest value.

    Every part of every tensor has to be there, and padding has to be zero.
    """
    missing = {name: torch.ones_like(tensor, dtype=torch.bool) for name, tensor in expected.items()}
    for piece in pieces:
        if piece.name is None:
            assert not piece.values.any(), "padding isn't zero"
            continue
        whole, length = expected[piece.name], piece.stop - piece.start
        part, scale = whole.narrow(piece.dim, piece.start, length), float(whole.abs().max())
        missing[piece.name].narrow(piece.dim, piece.start, length).fill_(False)
        name_it = partial("{}: {}".format, piece.name)
        torch.testing.assert_close(piece.values, part, rtol=0, atol=tolerance * scale, msg=name_it)
    assert [name for name, rows in missing.items() if rows.any()] == []


@cache
def reference_logits_BSV(reference: Reference) -> Tensor:
    """Return the logits of Hugging Face's model for every token but the first of each row."""
    with torch.no_grad():
        return hf_logits_BSV(load(reference.folder), reference.everything)


def assert_scored_as(answers: Sequence[Scored | None], expected: Reference, layout: Layout) -> None:
    """Compare logits and log-probs with Hugging Face's; the output ranks report them, and no others."""
    assert tuple(rank for rank, answer in enumerate(answers) if answer is not None) == layout.output_ranks()
    scored = [answer for answer in answers if answer is not None]
    logits_BSV, logprobs_BS = (torch.cat([getattr(s, name) for s in scored]) for name in ("logits_BSV", "logprobs_BS"))
    torch.testing.assert_close(logits_BSV, reference_logits_BSV(expected), rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(logprobs_BS, expected.logprobs_BS, rtol=0, atol=TOLERANCE)


def assert_first_step_is(answers: Sequence[Examined], expected: hf_training.Trained, layout: Layout) -> None:
    """Compare every gradient, the loss, and on every rank the gradient norm with Hugging Face's."""
    assert_pieces_are([piece for found in answers for piece in found.gradients], expected.first_gradients, TOLERANCE)
    (step,) = summed([[found.metrics] for found in answers], layout)
    assert step["loss"] == pytest.approx(expected.losses[0], rel=TRAINING_TOLERANCE)
    norms = [found.metrics["grad_norm"] for found in answers]
    assert norms == pytest.approx([expected.grad_norms[0]] * len(norms), rel=TRAINING_TOLERANCE)


def assert_trained_as(found: Sequence[Trained], expected: hf_training.Trained, layout: Layout) -> None:
    """Compare loss and gradient norm of every step, and the last weights, with Hugging Face's and AdamW's."""
    assert_steps_are([rank.metrics for rank in found], expected, layout)
    assert_pieces_are([piece for rank in found for piece in rank.weights], expected.weights, TRAINING_TOLERANCE)


def assert_steps_are(metrics: Sequence[Sequence[Metrics]], expected: hf_training.Trained, layout: Layout) -> None:
    """Compare loss and gradient norm of every step with Hugging Face's."""
    steps = summed(metrics, layout)
    assert [s["loss"] for s in steps] == pytest.approx(expected.losses, rel=TRAINING_TOLERANCE, abs=1e-6)
    assert [s["grad_norm"] for s in steps] == pytest.approx(expected.grad_norms, rel=TRAINING_TOLERANCE)


def assert_near_in_bf16(found: Sequence[Metrics], expected: Sequence[Metrics]) -> None:
    """Compare loss and gradient norm of every step with those of another layout in bfloat16."""
    for name in ("loss", "grad_norm"):
        assert [s[name] for s in found] == pytest.approx([s[name] for s in expected], rel=BF16_TOLERANCE)


def assert_export_is_what_was_loaded(ranks: RankPool, role: Role, out: Path) -> None:
    """Let ranks write the role's model to ``out``, and compare every tensor to the bit."""
    ask(ranks, export, role, out)
    loaded, exported = (load_file(folder / "model.safetensors") for folder in (Path(role.model.here()), out))
    assert exported.keys() == loaded.keys()
    assert [name for name in loaded if not exported[name].equal(loaded[name])] == []
    assert {tensor.dtype for tensor in exported.values()} == {torch.float32}
