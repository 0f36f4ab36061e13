"""What a rank holds on its device in each phase of a step, as torch's allocator counts it; nothing on CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on a device. allocated, reserved: after a phase, in tensors and with what is kept for them.

    peak: most that was allocated at a moment of the phase.
    """

    allocated: int
    reserved: int
    peak: int

    def largest(self, other: DeviceMemory) -> DeviceMemory:
        """Return the larger of every figure."""
        return DeviceMemory(
            max(self.allocated, other.allocated), max(self.reserved, other.reserved), max(self.peak, other.peak)
        )


class MemoryByPhase:
    """The largest DeviceMemory of every phase since it was last asked for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._largest: dict[str, DeviceMemory] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Watch a phase. Phases don't nest."""
        if self._device.type != "cuda":
            yield
            return
        torch.cuda.reset_peak_memory_stats(self._device)
        yield
        found = DeviceMemory(
            torch.cuda.memory_allocated(self._device),
            torch.cuda.memory_reserved(self._device),
            torch.cuda.max_memory_allocated(self._device),
        )
        self._largest[name] = found.largest(self._largest.get(name, found))

    def drain(self) -> dict[str, DeviceMemory]:
        """Return what was found, by phase, and start again."""
        found, self._largest = self._largest, {}
        return found
