"""The optimizer steps of an update, over any backend."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megarl.batching.pack import MicroBatch
from megarl.train.backend import Backend, Loss, Output, Skipped
from megarl.train.work import SKIPPED, OptimizerStep, UpdateWork
from megarl.types import Metrics


def take_steps(backend: Backend, work: UpdateWork, loss_of: Callable[[OptimizerStep], Loss]) -> tuple[Metrics, ...]:
    """Take every optimizer step of ``work``; return the metrics of each: of one that was skipped, its gradient norm."""
    with backend.updating():
        return tuple(_take(backend, work, step, loss_of(step)) for step in work.steps)


def _take(backend: Backend, work: UpdateWork, step: OptimizerStep, loss: Loss) -> Metrics:
    micros = backend.pack(work.batch, step.micro_batches)
    told = backend.step(micros, _telling_gradients(loss), step.num_rollouts)
    return {"grad_norm": told.grad_norm, SKIPPED: 1.0} if isinstance(told, Skipped) else told


def _telling_gradients(loss: Loss) -> Loss:
    """Return a loss whose gradients are NaN wherever it, or a number that it tells of, is NaN or infinite.

    Such a loss may have finite gradients: infinite log-probs cancel or are clipped. The gradient's norm tells every
    rank of it, which then takes no step. Others are multiplied by 1, which changes no bit.
    """

    def telling(micro: MicroBatch, output: Output) -> tuple[Tensor, dict[str, Tensor]]:
        total, told = loss(micro, output)
        numbers = torch.stack([number.detach().float() for number in (total, *told.values())])
        return total * torch.where(numbers.isfinite().all(), 1.0, torch.nan), told

    return telling


def summed(results: Sequence[dict[str, Tensor]]) -> Metrics:
    """Add up the numbers of the micro-batches; empty on ranks that aren't on the last stage."""
    sums: dict[str, float] = defaultdict(float)
    for result in results:
        for name, value in result.items():
            sums[name] += float(value)
    return dict(sums)


def detached(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return copies without a graph: Megatron scales the loss tensor in place."""
    return {name: value.detach().clone() for name, value in metrics.items()}
