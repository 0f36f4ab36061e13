"""How much memory a forward pass keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def saved_activation_bytes(forward: Callable[[], object], parameters: Iterable[Tensor] = ()) -> int:
    """Return the bytes of all storages that ``forward`` saves for its backward pass, each counted once and whole.

    Storages of ``parameters`` don't count, nor does any tensor that is a Parameter: they are there anyway.
    """
    resident = {parameter.untyped_storage()._cdata for parameter in parameters}
    saved: dict[int, torch.UntypedStorage] = {}  # held, so that no address comes twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in resident and not isinstance(tensor, torch.nn.Parameter):
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in saved.values())
