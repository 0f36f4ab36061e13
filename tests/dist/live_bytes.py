"""How much memory whatever torch makes in a stretch of code takes, while it is there."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """The bytes of all storages that operations have made in this context and that are still there: now, and at most.

    Storages count as large as they are when one looks: FSDP makes and empties its own again and again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._made: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
                known = self._made.get(storage._cdata)
                if known is None or known.expired():
                    self._made[storage._cdata] = StorageWeakRef(storage)
        self.peak = max(self.peak, self.now())
        return out

    def now(self, without: Collection[int] = ()) -> int:
        """Return the bytes that are there now. without: addresses of storages that don't count."""
        sizes = {address: _live_bytes(made) for address, made in self._made.items()}
        self._made = {address: made for address, made in self._made.items() if sizes[address] is not None}
        return sum(size for address, size in sizes.items() if size is not None and address not in without)


def _live_bytes(made: StorageWeakRef) -> int | None:
    """Return the size of the storage, or None if it is gone: gloo's threads let go of theirs at any time."""
    storage = torch.UntypedStorage._new_with_weak_ptr(made.cdata)
    return None if storage is None else storage.nbytes()
