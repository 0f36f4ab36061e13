"""Which cores of a node are near its GPUs: from others, a rank reaches its device by way of another socket."""

from __future__ import annotations

import os
from pathlib import Path

_DEVICES = Path("/sys/bus/pci/devices")


def cores_near(pci_address: str, devices: Path = _DEVICES) -> frozenset[int]:
    """Return the cores on the NUMA node of a device; none where the kernel doesn't say. pci_address: 0000:1b:00.0."""
    try:
        text = (devices / pci_address.lower() / "local_cpulist").read_text(encoding="ascii").strip()
    except OSError:
        return frozenset()
    cores: set[int] = set()
    for part in text.split(",") if text else ():
        first, _, last = part.partition("-")
        cores |= set(range(int(first), int(last or first) + 1))
    return frozenset(cores)


def bind_near(pci_address: str, devices: Path = _DEVICES) -> frozenset[int]:
    """Have all threads of this process run on the cores near a device, of those that it has, and what they start too.

    Return these cores. Where none of them is near, or the kernel doesn't say which are, the process keeps all.
    """
    own = frozenset(os.sched_getaffinity(0))
    near = own & cores_near(pci_address, devices)
    if not near:
        return own
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), near)
    return near
