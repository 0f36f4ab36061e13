"""What tests see inside an FSDP backend."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from megarl.train.fsdp.backend import FsdpBackend
from megarl.train.fsdp.optimizer import Optimizer


def optimizer_of(backend: FsdpBackend) -> Optimizer:
    """Return the optimizer of a trained role."""
    assert backend.optimizer is not None
    return backend.optimizer


def keep_gradients(backend: FsdpBackend) -> dict[str, Tensor]:
    """Return a dict that the next optimizer steps fill with gradients, by the name map's names."""
    found: dict[str, Tensor] = {}

    def keep(*_: object) -> None:
        found.update(_gradients(backend))

    optimizer_of(backend).inner.register_step_pre_hook(keep)
    return found


def _gradients(backend: FsdpBackend) -> dict[str, Tensor]:
    gradients = {}
    for parameter in backend.model.own_parameters():
        assert isinstance(parameter, DTensor) and isinstance(parameter.grad, DTensor)
        gradients[local(parameter).untyped_storage().data_ptr()] = local(parameter.grad).clone()
    return {
        name: torch.as_strided(
            gradients[part.untyped_storage().data_ptr()], part.shape, part.stride(), part.storage_offset()
        )
        for name, part in backend.parameters().items()
        if part.numel()
    }


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor."""
    assert isinstance(tensor, DTensor)
    return tensor.to_local()
