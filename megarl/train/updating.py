"""The optimizer steps of an update, over any backend."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from megarl.errors import WorkerError
from megarl.train.backend import Backend, Loss, Skipped
from megarl.train.work import OptimizerStep, UpdateWork
from megarl.types import Metrics


def take_steps(backend: Backend, work: UpdateWork, loss_of: Callable[[OptimizerStep], Loss]) -> tuple[Metrics, ...]:
    """Take every optimizer step of ``work``; return the metrics of each.

    Raises WorkerError where a gradient isn't finite.
    """
    with backend.updating():
        return tuple(_take(backend, work, step, loss_of(step)) for step in work.steps)


def _take(backend: Backend, work: UpdateWork, step: OptimizerStep, loss: Loss) -> Metrics:
    micros = backend.pack(work.batch, step.micro_batches)
    told = backend.step(micros, loss, step.num_rollouts)
    if isinstance(told, Skipped):
        raise WorkerError(
            f"the gradient norm of the {work.role} is {told.grad_norm}: this optimizer step was not taken. Lower "
            "optim.lr, raise lr_scheduler.warmup_steps, or look for non-finite rewards and log-probs in metrics.jsonl"
        )
    return told


def detached(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return copies without a graph: Megatron scales the loss tensor in place."""
    return {name: value.detach().clone() for name, value in metrics.items()}
