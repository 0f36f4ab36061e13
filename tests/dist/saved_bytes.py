"""How much memory forward passes keep for backward passes."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def saved_activation_bytes(forward: Callable[[], object], parameters: Iterable[Tensor] = ()) -> int:
    """Return the bytes of all storages that ``forward`` saves for its backward pass, each counted once and whole.

    Storages of ``parameters`` don't count, nor does any tensor that is a Parameter: they are there anyway.
    """
    held = HeldBytes(parameters)
    graph = []  # held, so that nothing of it is given back
    with held.counting():
        graph.append(forward())
    return held.peak


class HeldBytes:
    """The bytes of all storages that autograd and others hold, each counted once and whole: now, and at most so far.

    Storages of ``parameters`` don't count, nor does any tensor that is a Parameter: they are there anyway.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.now = self.peak = 0
        self._resident = {parameter.untyped_storage()._cdata for parameter in parameters}
        self._holders: Counter[int] = Counter()

    def counting(self) -> torch.autograd.graph.saved_tensors_hooks:
        """Count what autograd saves meanwhile, until it drops it."""
        return torch.autograd.graph.saved_tensors_hooks(self._save, lambda saved: saved.tensor)

    def hold(self, tensor: Tensor, holder: object) -> None:
        """Count the storage of ``tensor`` as long as ``holder``, which keeps it alive, is there."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._resident or isinstance(tensor, torch.nn.Parameter):
            return
        if not self._holders[storage._cdata]:
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
        self._holders[storage._cdata] += 1
        weakref.finalize(holder, self._drop, storage._cdata, storage.nbytes()).atexit = False

    def _save(self, tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        self.hold(tensor, saved)
        return saved

    def _drop(self, address: int, num_bytes: int) -> None:
        self._holders[address] -= 1
        if not self._holders[address]:
            self.now -= num_bytes


class _Saved:
    """What autograd's graph has of a tensor: not the tensor itself, whose place in the graph would close a circle."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()
