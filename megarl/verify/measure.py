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
    DISTRIBUTED_LOSS,
    ENGINE,
    EXPORT,
    GRAD_NORM,
    LOGPROBS,
    LOSS,
    Figure,
    Tolerances,
)
from megarl.verify.reference import Reference, mean_difference
from megarl.verify.work import Examined
from megarl.weights.model_shape import ModelShape
from megarl.weights.name_map import hf_shapes
from megarl.weights.sources import SafetensorsSource


def logprob_figures(
    ranks: Sequence[Examined], layout: Layout, reference: Reference, tolerances: Tolerances
) -> list[Figure]:
    """Return the largest difference from Hugging Face's log-probs in float32, and the mean one in bfloat16."""
    reporting = [ranks[rank] for rank in layout.output_ranks()]
    logprobs_BS = _together([rank.logprobs_BS for rank in reporting])
    bf16_logprobs_BS = _together([rank.bf16_logprobs_BS for rank in reporting])
    in_bf16 = mean_difference(bf16_logprobs_BS, reference.rounded_logprobs_BS, reference.everything)
    return [
        Figure(LOGPROBS, float((logprobs_BS - reference.logprobs_BS).abs().max()), tolerances.logprobs),
        Figure(BF16, in_bf16, tolerances.bf16 * reference.hf_bf16),
    ]


def training_figures(
    ranks: Sequence[Examined], alone: Sequence[Examined], layout: Layout, tolerance: float
) -> list[Figure]:
    """Return the largest relative differences of any step from those of one rank with a replicated optimizer.

    Losses are sums over the ranks that report; every rank knows the gradient norm.
    """
    found: list[Figure] = []
    expected = alone[0].replicated
    for loss, grad_norm, steps in (
        (LOSS, GRAD_NORM, [rank.replicated for rank in ranks]),
        (DISTRIBUTED_LOSS, DISTRIBUTED_GRAD_NORM, [rank.distributed for rank in ranks]),
    ):
        if not steps[0]:
            continue
        shares = [steps[rank] for rank in layout.output_ranks()]
        losses = [sum(share[i]["loss"] for share in shares) for i in range(len(expected))]
        found.append(Figure(loss, _relative([losses], expected, "loss"), tolerance))
        norms = [[step["grad_norm"] for step in of_rank] for of_rank in steps]
        found.append(Figure(grad_norm, _relative(norms, expected, "grad_norm"), tolerance))
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


def _relative(found: Sequence[Sequence[float]], expected: Sequence[Metrics], name: str) -> float:
    """Return the largest relative difference of any rank's steps from the expected ones; NaN where one is."""
    wanted = torch.tensor([step[name] for step in expected], dtype=torch.float64)
    return float(((torch.tensor(found, dtype=torch.float64) - wanted) / wanted).abs().max())
