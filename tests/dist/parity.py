"""What every parity test shares: training jobs, Hugging Face's answers, and how ours are compared with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megarl.algorithm.policy_loss import PolicyLossSettings
from megarl.batching.pack import sequences_to_batch
from megarl.parallel.layout import Layout
from megarl.train.megatron.optimizer import OptimizerSpec
from megarl.train.work import Metrics, PolicyLossSpec, is_whole
from megarl.types import Batch
from tests.dist import hf_reference
from tests.dist.parity_cases import Examined, Job, Piece, Scored, Trained
from tests.dist.tiny_models import VOCAB_SIZE

TOLERANCE = 2e-5
TRAINING_TOLERANCE = 1e-5
BF16_TOLERANCE = 2e-2
TEMPERATURE = 0.7

TELLING = ("qwen2-tied", "qwen3-untied")
"""The models that take every layout each time: between them they have all that families differ in but Llama's RoPE."""

LENGTHS = (9, 12, 12, 7, 16, 5, 9, 3)
PROMPT_LENGTH = 2
"""Rows of different and of equal lengths, odd sums; the last row has no token that is trained on."""

# An epsilon far above the rounding errors of gradients: Adam would blow them up where the gradient is next to zero.
OPTIMIZER = OptimizerSpec(
    lr=2e-4,
    min_lr=0.0,
    weight_decay=0.1,
    betas=(0.9, 0.95),
    eps=1e-5,
    clip_grad=1.0,
    schedule="constant",
    warmup_steps=0,
    total_steps=10,
    use_distributed_optimizer=True,
)
REPLICATED = replace(OPTIMIZER, use_distributed_optimizer=False)
# Takes a step that leaves gradients and weights as they are.
LOOKING = replace(REPLICATED, lr=0.0, clip_grad=1e9)

PPO = PolicyLossSpec(
    PolicyLossSettings(clip_low=0.2, clip_high=0.25, clip_c=1.3),
    loss_agg_mode="token-mean",
    kl_coef=0.1,
    kl_type="low_var_kl",
    temperature=TEMPERATURE,
)
SEQUENCE_SUM = replace(PPO, loss_agg_mode="seq-mean-token-sum", kl_type="mse")
SEQUENCE_SUM_NORM = replace(PPO, loss_agg_mode="seq-mean-token-sum-norm", max_tokens=20, entropy_coef=0.05)
SEQUENCE_MEAN = replace(PPO, loss_agg_mode="seq-mean-token-mean", kl_coef=None)
JOBS = {
    "sft": Job(None, OPTIMIZER),
    "sft_replicated_optimizer": Job(None, REPLICATED),
    "ppo_token_mean": Job(PPO, OPTIMIZER),
    "ppo_sequence_sum_padded": Job(SEQUENCE_SUM, OPTIMIZER, packed=False),
    "ppo_sequence_sum_norm": Job(SEQUENCE_SUM_NORM, REPLICATED, packed=False),
    "ppo_sequence_mean": Job(SEQUENCE_MEAN, REPLICATED),
}
MICRO_BATCH_SIZES = {f"{size}": replace(JOBS["ppo_token_mean"], micro_batch_size=size) for size in (1, 3, 8)}


@dataclass(frozen=True)
class Reference:
    """A model and what Hugging Face says of its batch; log-probs are those of every token."""

    folder: Path
    batch: Batch
    logits_BSV: Tensor
    logprobs_BS: Tensor


def make_reference(folder: Path) -> Reference:
    """Ask Hugging Face about the model in ``folder`` and a random batch, as rollouts of a policy close to it."""
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist() for length in LENGTHS]
    everything = sequences_to_batch(tokens, [[True] * length for length in LENGTHS])
    trained_on = sequences_to_batch(tokens, [_mask(length) for length in LENGTHS])
    model = hf_reference.load(folder)
    with torch.no_grad():
        logits_BSV = hf_reference.logits_BSV(model, everything)
        logprobs_BS = hf_reference.logprobs_BS(model, everything, TEMPERATURE)

    def near_logprobs() -> Tensor:
        noise_BS = 0.2 * torch.randn(logprobs_BS.shape, generator=generator)
        return (logprobs_BS + noise_BS) * trained_on.mask_BS

    batch = replace(
        trained_on,
        old_logprobs_BS=near_logprobs(),
        ref_logprobs_BS=near_logprobs(),
        advantages_BS=torch.randn(logprobs_BS.shape, generator=generator) * trained_on.mask_BS,
    )
    return Reference(folder, batch, logits_BSV, logprobs_BS)


def _mask(length: int) -> list[bool]:
    return [position >= PROMPT_LENGTH and length > PROMPT_LENGTH + 1 for position in range(length)]


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


def assert_scored_as(answers: Sequence[Scored | None], expected: Reference, layout: Layout) -> None:
    """Compare logits and log-probs with Hugging Face's; the output ranks report them, and no others."""
    assert tuple(rank for rank, answer in enumerate(answers) if answer is not None) == layout.output_ranks()
    scored = [answer for answer in answers if answer is not None]
    logits_BSV, logprobs_BS = (torch.cat([getattr(s, name) for s in scored]) for name in ("logits_BSV", "logprobs_BS"))
    torch.testing.assert_close(logits_BSV, expected.logits_BSV, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(logprobs_BS, expected.logprobs_BS, rtol=0, atol=TOLERANCE)


def assert_first_step_is(answers: Sequence[Examined], expected: hf_reference.Training, layout: Layout) -> None:
    """Compare every gradient, the loss, and on every rank the gradient norm with Hugging Face's."""
    assert_pieces_are([piece for found in answers for piece in found.gradients], expected.first_gradients, TOLERANCE)
    (step,) = summed([[found.metrics] for found in answers], layout)
    assert step["loss"] == pytest.approx(expected.losses[0], rel=TRAINING_TOLERANCE)
    norms = [found.metrics["grad_norm"] for found in answers]
    assert norms == pytest.approx([expected.grad_norms[0]] * len(norms), rel=TRAINING_TOLERANCE)


def assert_trained_as(found: Sequence[Trained], expected: hf_reference.Training, layout: Layout) -> None:
    """Compare loss and gradient norm of every step, and the last weights, with Hugging Face's and AdamW's."""
    steps = summed([rank.metrics for rank in found], layout)
    assert [s["loss"] for s in steps] == pytest.approx(expected.losses, rel=TRAINING_TOLERANCE, abs=1e-6)
    assert [s["grad_norm"] for s in steps] == pytest.approx(expected.grad_norms, rel=TRAINING_TOLERANCE)
    assert_pieces_are([piece for rank in found for piece in rank.weights], expected.weights, TRAINING_TOLERANCE)
