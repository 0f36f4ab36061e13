"""The weights that a trainer's ranks hand to engines on their host, in memory that both have mapped.

Every rank of the trainer has one segment, which it writes at each publication and every engine reads: a byte is written
once, however many engines there are. It has no name (memfd): an engine opens it by way of /proc, nothing of it counts
as /dev/shm, and it is gone with the last process that holds it, however that ends. ``shared_plan`` says what is in it.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megarl.errors import PublishError
from megarl.weights.checksums import check_arrived, checksums
from megarl.weights.flow import Rows
from megarl.weights.reshard import Tensors, source_of, target_of
from megarl.weights.shared_plan import SharedPlan

HEADER_BYTES = 64
"""Bytes before the weights, which say what these are: the numbers of two publications, see ``SharedWriter.write``."""
_ALIGNED_BYTES = 64


def host_name() -> str:
    """Return a name that all processes share which can open each other's memory, and no others on any machine."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}"


@dataclass(frozen=True)
class Segment:
    """A rank's memory, as others open it: ``fd`` of process ``pid``. host: by ``host_name``.

    offsets: for each plan, the byte at which the stream to each rank begins. checksums: likewise, of the rows of the
    stream as they were sent; none of a publication that isn't verified.
    """

    host: str
    pid: int
    fd: int
    num_bytes: int
    offsets: tuple[Mapping[int, int], ...]
    checksums: tuple[Mapping[int, tuple[int, ...]], ...] = ()


class SharedWriter:
    """Writes what one rank of the trainer sends, in elements of ``dtype``."""

    def __init__(self, plan: SharedPlan, dtype: torch.dtype) -> None:
        self.plan, self.dtype = plan, dtype
        offsets: list[dict[int, int]] = []
        end = HEADER_BYTES
        for part in plan.plans:
            offsets.append({})
            for receiver, stream in part.sends.items():
                offsets[-1][receiver] = end
                end += -(-stream.numel * dtype.itemsize // _ALIGNED_BYTES) * _ALIGNED_BYTES
        fd, self._memory = new_memory(end)
        self.segment = Segment(host_name(), os.getpid(), fd, end, tuple(offsets))
        self._versions = _versions(self._memory)

    @property
    def memory(self) -> Tensor:
        """The bytes of the segment, as a view."""
        return torch.frombuffer(self._memory, dtype=torch.uint8)

    @torch.no_grad()
    def write(self, parameters: Tensors, policy_version: int, *, verify: bool = False) -> Segment:
        """Write a publication's weights, and return where they are. verify: with their checksums."""
        self._versions[0] = policy_version
        for plan, offsets in zip(self.plan.plans, self.segment.offsets, strict=True):
            for receiver, stream in plan.sends.items():
                elements = _elements(self._memory, self.dtype, offsets[receiver], stream.numel)
                at = 0
                for rows in stream.rows(0, stream.numel):
                    elements[at : at + rows.numel].view(rows.sizes).copy_(source_of(rows, parameters))
                    at += rows.numel
        self._versions[1] = policy_version
        return replace(self.segment, checksums=self._checksums(parameters)) if verify else self.segment

    def _checksums(self, parameters: Tensors) -> tuple[dict[int, tuple[int, ...]], ...]:
        """Return those of what is sent to each rank, by plan: of the parameters, and not of the memory."""

        def sent(rows: Rows) -> Tensor:
            return source_of(rows, parameters).to(self.dtype)

        return tuple(
            {receiver: checksums(stream.rows(0, stream.numel), sent) for receiver, stream in plan.sends.items()}
            for plan in self.plan.plans
        )


class SharedReader:
    """Reads what one rank of an engine needs, in elements of ``dtype``."""

    def __init__(self, plan: SharedPlan, dtype: torch.dtype) -> None:
        self.plan, self.dtype = plan, dtype
        self._memories: dict[tuple[int, int], mmap.mmap] = {}

    def check(self, segments: Sequence[Segment], policy_version: int) -> None:
        """Raise PublishError unless all segments hold this publication, whole."""
        for rank, segment in enumerate(segments):
            found: list[int] = _versions(self._memory(segment)).tolist()
            if found != [policy_version, policy_version]:
                raise PublishError(
                    f"the weights of rank {rank} are those of publication {found[0]}"
                    + (f", of which {found[1]} is whole" if found[0] != found[1] else "")
                    + f"; the engine was told to take {policy_version}"
                )

    @torch.no_grad()
    def read(self, segments: Sequence[Segment], index: int, targets: Tensors) -> None:
        """Fill ``targets`` in place with what the plan of this index has for them. segments: by rank of the trainer."""
        plan = self.plan.plans[index]
        for sender, stream in plan.receives.items():
            segment = segments[sender]
            offset = segment.offsets[index][plan.rank]
            elements = _elements(self._memory(segment), self.dtype, offset, stream.numel)
            at = 0
            for rows in stream.rows(0, stream.numel):
                target_of(rows, targets).copy_(elements[at : at + rows.numel].view(rows.sizes))
                at += rows.numel

    @torch.no_grad()
    def verify(self, segments: Sequence[Segment], index: int, targets: Tensors) -> None:
        """Raise PublishError where ``targets`` don't hold what was sent, by the checksums that a publication brings."""
        plan = self.plan.plans[index]
        receiver = f"rank {plan.rank - len(segments)} of the engine"
        for sender, stream in plan.receives.items():
            if segments[sender].checksums:
                sent = segments[sender].checksums[index][plan.rank]
                found = checksums(stream.rows(0, stream.numel), lambda rows: target_of(rows, targets))
                check_arrived(sent, found, stream.rows(0, stream.numel), sender, receiver)

    def _memory(self, segment: Segment) -> mmap.mmap:
        key = segment.pid, segment.fd
        if key not in self._memories:
            path = f"/proc/{segment.pid}/fd/{segment.fd}"
            try:
                with open(path, "r+b") as file:
                    self._memories[key] = mmap.mmap(file.fileno(), segment.num_bytes)
            except OSError as error:
                raise PublishError(
                    f"an engine can't open the memory that holds the weights, {path}: {error}. Engines and ranks share "
                    "a host, a user and the numbers of its processes"
                ) from error
        return self._memories[key]


def new_memory(num_bytes: int) -> tuple[int, mmap.mmap]:
    """Return memory without a name that holds no publication, and the descriptor by which others open it."""
    fd = os.memfd_create("megarl_weights")
    os.ftruncate(fd, num_bytes)
    memory = mmap.mmap(fd, num_bytes)
    _versions(memory).fill_(-1)
    return fd, memory


def _versions(memory: mmap.mmap) -> Tensor:
    """Return the number of the publication that was begun, and of the last that was ended, as a view [2]."""
    return torch.frombuffer(memory, dtype=torch.int64, count=2)


def _elements(memory: mmap.mmap, dtype: torch.dtype, offset: int, count: int) -> Tensor:
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset)
