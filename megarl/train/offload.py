"""Tensors that leave their device between uses: to host memory, or for good where their values aren't needed again.

A storage is emptied and filled again in place. Megatron keeps views into its buffers (parameters into theirs, main
parameters into parameters, gradients into gradient buffers), and all of them stay views of the same storage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, UntypedStorage


@dataclass(frozen=True)
class _Away:
    """An emptied storage, how large it was, and what it held: nothing where its values were dropped."""

    storage: UntypedStorage
    num_bytes: int
    host: tuple[Tensor, ...]


class Offload:
    """Keeps tensors off their device unless somebody uses them; where not ``enabled``, they never leave.

    tensors: says which, each time they leave, since optimizers grow state and wrappers replace parameters.
    keep_values: whether they come back with the values they had; otherwise what they hold is undefined.
    """

    def __init__(self, tensors: Callable[[], Iterable[Tensor]], *, enabled: bool, keep_values: bool = True) -> None:
        self._tensors, self._enabled, self._keep_values = tensors, enabled, keep_values
        self._num_users = 0
        self._away: list[_Away] = []
        self._pinned: dict[int, tuple[Tensor, ...]] = {}

    @property
    def is_away(self) -> bool:
        """Whether the tensors must not be touched now."""
        return bool(self._away)

    @contextmanager
    def resident(self) -> Iterator[None]:
        """Have the tensors on their device for the duration. Uses may overlap: the last to end sends them away.

        After an error they stay: whoever reports it finds everything as it was.
        """
        if self._num_users == 0:
            self._come_back()
        self._num_users += 1
        try:
            yield
        finally:
            self._num_users -= 1
        if self._num_users == 0 and self._enabled:
            self._leave()

    def _leave(self) -> None:
        # By address of the storage, which is one object to torch and to every view.
        storages = {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in self._tensors())}
        pinned, self._pinned = self._pinned, {}
        for address, storage in storages.items():
            host: tuple[Tensor, ...] = ()
            if self._keep_values:
                host = pinned.get(address, ())
                if sum(map(len, host)) != storage.nbytes():
                    host = _host_memory(storage.nbytes(), pinned=storage.device.type == "cuda")
                for there, here in zip(host, _bytes(storage).split([len(piece) for piece in host]), strict=True):
                    there.copy_(here, non_blocking=True)
                if storage.device.type == "cuda":
                    self._pinned[address] = host
            self._away.append(_Away(storage, storage.nbytes(), host))
            storage.resize_(0)
        if any(away.storage.device.type == "cuda" for away in self._away):
            # The engine has an allocator of its own, which finds only what torch's gives back to the device.
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def _come_back(self) -> None:
        while self._away:
            away = self._away.pop()
            away.storage.resize_(away.num_bytes)
            if away.host:
                here = _bytes(away.storage).split([len(piece) for piece in away.host])
                for target, piece in zip(here, away.host, strict=True):
                    target.copy_(piece, non_blocking=True)


def _bytes(storage: UntypedStorage) -> Tensor:
    """Return all of a storage as uint8."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _host_memory(num_bytes: int, *, pinned: bool) -> tuple[Tensor, ...]:
    """Return buffers of ``num_bytes`` together. Pinned ones are kept between uses, since pinning is slow."""
    sizes = pinned_sizes(num_bytes) if pinned else [num_bytes]
    return tuple(torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for size in sizes)


def pinned_sizes(num_bytes: int) -> list[int]:
    """Cut ``num_bytes`` so that at most an eighth more is pinned: torch pins the next power of two of every request."""
    sizes: list[int] = []
    rest = num_bytes
    while rest > num_bytes // 8 and rest & (rest - 1):
        sizes.append(1 << (rest.bit_length() - 1))
        rest -= sizes[-1]
    return [*sizes, rest] if rest else sizes
