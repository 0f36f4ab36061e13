"""Weights that cross from the trainer's ranks to another host, where engines read them as they would the ranks' own.

Each rank and such a host are a process group of two, so that the loss of a host concerns no other. A byte crosses once
for each host, however many engines are there, into memory of the same kind: ``weights/shared`` says what is in it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, Store  # type: ignore[attr-defined] # torch doesn't list it

from megarl.ranks.meeting import interface_to, listening, tcp_store
from megarl.weights.shared import HEADER_BYTES, Segment, host_name, new_memory

_RANK, _MIRROR = 0, 1


@dataclass(frozen=True)
class Meeting:
    """Where a host waits for the trainer's ranks. name: by ``host_name``. timeout_s: how long one waits for another."""

    name: str
    address: str
    port: int
    timeout_s: float


class Mirror:
    """The memory of the trainer's ranks as another host has it, for the engines there."""

    def __init__(self, address: str, timeout_s: float) -> None:
        """Listen for the ranks at ``address``, of this host. timeout_s: how long one may keep this waiting."""
        listener = listening(address)
        self.meeting = Meeting(host_name(), address, listener.getsockname()[1], timeout_s)
        self._store = tcp_store(address, self.meeting.port, listener)
        self._groups: dict[int, Any] = {}
        self._copies: dict[int, tuple[int, Tensor]] = {}

    def meet(self, segments: Sequence[Segment]) -> None:
        """Meet the ranks that are on other hosts. segments: of all, by rank."""
        for rank, segment in enumerate(segments):
            if segment.host != self.meeting.name:
                fd, memory = new_memory(segment.num_bytes)
                self._copies[rank] = fd, torch.frombuffer(memory, dtype=torch.uint8)
                self._groups[rank] = _group(self._store, rank, _MIRROR, self.meeting)

    def receive(self) -> None:
        """Take a publication in. Raises RuntimeError where a rank is gone, or says nothing for too long."""
        for _, bytes_N in self._copies.values():
            bytes_N[:HEADER_BYTES] = 255  # no publication, until all of it is here
        works = []
        for rank, group in self._groups.items():
            headers, weights = _parts(self._copies[rank][1])
            works += [group.recv([weights], _RANK, 0), group.recv([headers], _RANK, 1)]
        for work in works:
            work.wait()

    def here(self, segments: Sequence[Segment]) -> tuple[Segment, ...]:
        """Return the segments as engines of this host find them."""
        return tuple(
            replace(segment, host=self.meeting.name, pid=os.getpid(), fd=self._copies[rank][0])
            if rank in self._copies
            else segment
            for rank, segment in enumerate(segments)
        )


class MirroredRank:
    """A rank of the trainer, as it sends what it has written to other hosts."""

    def __init__(self, rank: int, segment: Segment, meetings: Sequence[Meeting] = ()) -> None:
        """Meet hosts. segment: the rank's."""
        self._rank, self._host = rank, segment.host
        self._groups: list[Any] = []
        self.meet(meetings)

    def meet(self, meetings: Sequence[Meeting]) -> None:
        """Meet hosts, beside those that were met before. The rank's own, and who doesn't come in time, are left out."""
        for meeting in meetings:
            if meeting.name != self._host:
                with suppress(RuntimeError):  # the controller, which started it, knows why
                    store = tcp_store(meeting.address, meeting.port, timeout=timedelta(seconds=meeting.timeout_s))
                    self._groups.append(_group(store, self._rank, _RANK, meeting))

    def send(self, bytes_N: Tensor) -> None:
        """Send a publication, and leave out from now on whoever is lost."""
        headers, weights = _parts(bytes_N)
        works = []
        for group in list(self._groups):
            try:
                works.append((group, [group.send([weights], _MIRROR, 0), group.send([headers], _MIRROR, 1)]))
            except RuntimeError:
                self._groups.remove(group)
        for group, sent in works:
            try:
                for work in sent:
                    work.wait()
            except RuntimeError:
                self._groups.remove(group)


def _parts(bytes_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bytes that say which publication it is, and the weights: these travel first."""
    return bytes_N[:HEADER_BYTES], bytes_N[HEADER_BYTES:]


def _group(store: Store, rank: int, member: int, meeting: Meeting) -> Any:
    """Return the group of a rank and a host, on the interface by which they reach each other."""
    gloo: Any = ProcessGroupGloo
    options = gloo._Options()
    interface = interface_to(meeting.address, meeting.port) or ""
    options._devices = [gloo.create_device(interface=interface)]
    options._timeout = timedelta(seconds=meeting.timeout_s)
    return gloo(PrefixStore(str(rank), store), member, 2, options)
