"""AdamW on this rank's part of a model's float32 parameters, with clipping and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from megarl.batching.pack import MicroBatch
from megarl.roles import Role
from megarl.train.backend import Loss, Skipped
from megarl.train.fsdp.model import FsdpModel
from megarl.train.held_state import MOMENTS, WEIGHT, Held, SavedState, UpdateCounts
from megarl.train.offload import Offload
from megarl.train.schedule import learning_rate
from megarl.train.updating import summed
from megarl.types import Metrics


class Optimizer:
    """Steps the parameters of ``model``. All methods are collective over all ranks."""

    def __init__(self, model: FsdpModel, role: Role) -> None:
        assert role.training is not None
        self.model, self.training, self.num_updates = model, role.training, 0
        self._state = Offload(self._state_tensors, enabled=role.residency.optimizer_offload)
        parameters = list(self._trained())
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": self.training.weight_decay},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},  # norms and biases
        ]
        self.inner = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=self.training.lr,
            betas=(self.training.betas[0], self.training.betas[1]),
            eps=self.training.eps,
            fused=model.device.type == "cuda",
        )

    @contextmanager
    def resident(self) -> Iterator[None]:
        """Have parameters and optimizer state on the device for the duration."""
        with self.model.resident(), self._state.resident():
            yield

    def _state_tensors(self) -> Iterator[Tensor]:
        """Yield this rank's part of the moments."""
        for state in self.inner.state.values():
            yield from (value.to_local() for value in state.values() if isinstance(value, DTensor))

    def step(self, micros: Sequence[MicroBatch], loss: Loss) -> Metrics | Skipped:
        """Take one optimizer step on the sum of ``loss`` over micro-batches and data-parallel ranks.

        Return the sum of what ``loss`` told over this rank's micro-batches, with grad_norm (before clipping) and lr;
        Skipped where the gradient isn't finite or too large. Gradients are there only meanwhile.
        """
        with self.resident():
            metrics = summed(self.model.run(micros, loss, forward_only=False))
            lr, gradients = self._set_learning_rate(), self._gradients()
            grad_norm = self._norm(gradients)
            is_taken = self.training.takes(grad_norm)
            if is_taken:
                if grad_norm > self.training.clip_grad:
                    torch._foreach_mul_(gradients, self.training.clip_grad / (grad_norm + 1e-6))
                self.inner.step()
            self.inner.zero_grad(set_to_none=True)
        return metrics | {"grad_norm": grad_norm, "lr": lr} if is_taken else Skipped(grad_norm)

    def _trained(self) -> Iterator[torch.nn.Parameter]:
        """Yield the parameters that are trained: all, or adapters alone."""
        return (parameter for parameter in self.model.own_parameters() if parameter.requires_grad)

    def held(self) -> Iterator[Held]:
        """Yield this rank's part of trained parameters and moments."""
        kinds = [self.model.parts(lambda parameter: parameter)]
        kinds += [self.model.parts(partial(self._moment, kind)) for kind in MOMENTS if self.inner.state]
        for parts in zip(*kinds, strict=True):
            values = {kind: part.reshape(-1) for kind, (_, part) in zip((WEIGHT, *MOMENTS), parts, strict=False)}
            shard = parts[0][0]
            yield Held(shard, 0, math.prod(shard.shape), values)

    def _moment(self, kind: str, parameter: Tensor) -> Tensor:
        moment: Tensor = self.inner.state[parameter][kind]
        return moment

    def counts(self) -> UpdateCounts:
        """Return the UpdateCounts of this optimizer."""
        steps = [int(state["step"]) for state in self.inner.state.values()]
        return UpdateCounts(self.num_updates, max(steps, default=0))

    def load(self, saved: SavedState, counts: UpdateCounts) -> None:
        """Take weights, moments and counts that were saved."""
        self.num_updates = counts.scheduled
        if counts.adam:
            for parameter in self._trained():
                state = self.inner.state[parameter]
                state["step"] = torch.tensor(float(counts.adam), device=self.model.device)
                for kind in MOMENTS:
                    state.setdefault(kind, torch.zeros_like(parameter))
        for held in self.held():
            saved.fill(held)

    def _gradients(self) -> list[Tensor]:
        """Return this rank's part of every gradient."""
        found = [parameter.grad for parameter in self.model.own_parameters()]
        return [gradient.to_local() for gradient in found if isinstance(gradient, DTensor)]

    def _norm(self, gradients: list[Tensor]) -> float:
        """Return the L2 norm of the whole gradient."""
        squares = torch.stack(torch._foreach_norm(gradients)).square().sum()
        dist.all_reduce(squares, group=self.model.ranks.parts)
        return float(squares.sqrt())

    def _set_learning_rate(self) -> float:
        """Give every group of parameters the learning rate of this update; return it."""
        self.num_updates += 1
        lr = learning_rate(self.training, self.num_updates)
        for group in self.inner.param_groups:
            group["lr"] = lr
        return lr
