"""Turns what ranks found on a layout into figures.

Shape suffixes: B rollouts, S sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megarl.parallel.layout import Layout
from megarl.types import Metrics
from megarl.verify.figures import (
    BF16,
    DISTRIBUTED_GRAD_NORM,
    DISTRIBUTED_LATER_LOSSES,
    ENGINE,
    EXPORT,
    GRAD_NORM,
    LATER_LOSSES,
    LOGPROBS,
    LOSS,
    Figure,
    Tolerances,
)
from megarl.verify.reference import Noise, Reference, mean_difference
from megarl.verify.work import Examined
from megarl.weights.model_shape import ModelShape
from megarl.weights.name_map import hf_shapes
from megarl.weights.sources import SafetensorsSource


def logprob_figures(
    ranks: Sequence[Examined], layout: Layout, reference: Reference, tolerances: Tolerances
) -> list[Figure]:
    """Return the largest difference from Hugging Face's log-probs in float64, and the mean one in bfloat16."""
    reporting = [ranks[rank] for rank in layout.output_ranks()]
    logprobs_BS = _together([rank.logprobs_BS for rank in reporting])
    bf16_logprobs_BS = _together([rank.bf16_logprobs_BS for rank in reporting])
    in_bf16 = mean_difference(bf16_logprobs_BS, reference.rounded_logprobs_BS, reference.everything)
    in_float32, noise = float((logprobs_BS - reference.exact_logprobs_BS).abs().max()), reference.noise
    return [
        Figure(LOGPROBS, in_float32, tolerances.logprobs * noise.logprobs),
        Figure(BF16, in_bf16, tolerances.bf16 * noise.bf16),
    ]


def training_figures(
    ranks: Sequence[Examined], alone: Sequence[Examined], layout: Layout, noise: Noise, tolerances: Tolerances
) -> list[Figure]:
    """Return differences from the optimizer steps of one rank with a replicated optimizer.

    Losses are sums over the ranks that report; every rank knows the gradient norm. A loss is a mean over tokens of
    terms that move with their log-prob about as much as it does: so it is compared absolutely, in errors of a log-prob.
    What later steps compute starts from weights in which Adam has amplified the rounding of gradients.
    """
    (loss, *later), (norm, *_) = _losses([alone[0].replicated]), _norms(alone[0].replicated)
    replicated, distributed = [rank.replicated for rank in ranks], [rank.distributed for rank in ranks]
    of_losses, of_gradients = tolerances.training * noise.logprobs, tolerances.training * noise.gradient
    found = [Figure(LOSS, _largest([_reported(replicated, layout)[0] - loss]), of_losses)]
    for check, steps in ((GRAD_NORM, replicated), (DISTRIBUTED_GRAD_NORM, distributed)):
        if not steps[0]:
            continue  # FSDP has one optimizer
        off = [_norms(of_rank)[0] / norm - 1 for of_rank in steps]
        found.append(Figure(check, _largest(off), of_gradients))
    for check, steps in ((LATER_LOSSES, replicated), (DISTRIBUTED_LATER_LOSSES, distributed)):
        if not steps[0]:
            continue
        off = [value - right for value, right in zip(_reported(steps, layout)[1:], later, strict=True)]
        found.append(Figure(check, _largest(off), tolerances.later * noise.logprobs))
    return found


def export_figure(folder: Path, exported: Path, shape: ModelShape) -> Figure:
    """Return how many tensors of ``exported`` aren't those of ``folder`` in float32, to the bit."""
    loaded, written = SafetensorsSource(folder, shape), SafetensorsSource(exported, shape)
    sizes = hf_shapes(shape)
    differing = [
        name
        for name, size in sizes.items()
        if not written.read(name, 0, 0, size[0]).equal(loaded.read(name, 0, 0, size[0]).float())
    ]
    return Figure(EXPORT, len(differing), 0.0, len(sizes))


def engine_figure(answers_by_rank: Sequence[list[list[int]]], expected: list[list[int]]) -> Figure:
    """Return on how many tokens, over all ranks, the engine's greedy answers aren't Hugging Face's."""
    pairs = [
        (token, wanted)
        for answers in answers_by_rank
        for answer, right in zip(answers, expected, strict=True)
        for token, wanted in zip(answer, right, strict=True)
    ]
    return Figure(ENGINE, sum(token != wanted for token, wanted in pairs), 0.0, len(pairs))


def _together(parts_BS: Sequence[Tensor | None]) -> Tensor:
    return torch.cat([part_BS for part_BS in parts_BS if part_BS is not None])


def _reported(steps: Sequence[Sequence[Metrics]], layout: Layout) -> list[float]:
    """Return the loss of every step, added up over the ranks that report."""
    return _losses([steps[rank] for rank in layout.output_ranks()])


def _losses(shares: Sequence[Sequence[Metrics]]) -> list[float]:
    return [sum(share["loss"] for share in of_step) for of_step in zip(*shares, strict=True)]


def _norms(of_rank: Sequence[Metrics]) -> list[float]:
    return [step["grad_norm"] for step in of_rank]


def _largest(differences: Sequence[float]) -> float:
    """Return the largest absolute difference, NaN where one is."""
    return float(torch.tensor(differences, dtype=torch.float64).abs().max())
