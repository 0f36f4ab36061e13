"""What the machine grants a run: memory, cores, shared memory, open files, processes, ports, disk."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path

from megarl.doctor.finding import Finding, Level, gibibytes, ok
from megarl.parallel.environment import PlatformName
from megarl.rollout.shared_memory import BYTES_PER_THREAD

PORTS = {
    6379: "a Ray cluster's head; runs join it only with RAY_ADDRESS set, or take `ray start --port=...`",
    8265: "Ray's dashboard; a second one takes the next free port",
    29500: "torchrun's default; give another: torchrun --master-port=29501, or --standalone",
}
NO_LIMIT = -1  # as the resource module has it

_RAY_OPEN_FILES = 65536  # what Ray raises its own limit to where it may
_FEW_PROCESSES = 4096  # every thread counts as one, and each of Ray's workers has dozens
_ROOM_BYTES = 2**30
_LITTLE_SHARED_BYTES = 2**20
_SHOWN_SEGMENTS = 8
_LITTLE_DISK_BYTES = 10 * 2**30
_NO_DISK_BYTES = 2**29
_LITTLE_MEMORY_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes of host memory. limit_bytes: the control group's (a container's), None without one."""

    total_bytes: int
    available_bytes: int
    limit_bytes: int | None = None


def check_memory(memory: Memory) -> Finding:
    """Judge host memory; a container's limit counts where it is below the machine's size."""
    usable = memory.available_bytes
    found = f"{gibibytes(memory.total_bytes)}, {gibibytes(memory.available_bytes)} available"
    if memory.limit_bytes is not None and memory.limit_bytes < memory.total_bytes:
        usable = min(usable, memory.limit_bytes)
        found += f"; this container may use {gibibytes(memory.limit_bytes)}"
    if usable < _LITTLE_MEMORY_BYTES:
        fix = "end other programs, or raise the container's limit (docker: --memory)"
        return Finding("warn", "memory", f"{found}; even a tiny model on two ranks wants about 4 GiB", fix)
    return ok("memory", found)


def check_cores(num_cores: int, limit: float | None) -> Finding:
    """Judge the cores this process may run on. limit: how many of them the control group lets it use at once."""
    found = f"{num_cores} for this process"
    if limit is not None and limit < num_cores:
        found += f", but this container may use the time of {limit:g}"
        num_cores = int(limit)
    if num_cores < 2:
        return Finding("warn", "cores", found, "ranks take turns on one core: expect twice the time, or add one")
    return ok("cores", found)


def check_shared_memory(total_bytes: int, free_bytes: int, platform: PlatformName) -> Finding:
    """Judge /dev/shm: Ray's object store, NCCL's and, on CPU, vLLM's buffers lie in it."""
    found = f"{gibibytes(total_bytes)}, {gibibytes(free_bytes)} free"
    fix = "remove files from it, or enlarge it (docker: --shm-size=8g; mount -o remount,size=8g /dev/shm)"
    if platform == "cpu" and free_bytes < 2 * BYTES_PER_THREAD:
        return Finding("FAIL", "/dev/shm", f"{found}: not even two vLLM ranks of one thread fit", fix)
    if free_bytes < _ROOM_BYTES:
        return Finding("warn", "/dev/shm", f"{found}: Ray's object store then lies on disk, and NCCL may fail", fix)
    return ok("/dev/shm", found)


def check_segments(sizes_bytes: Mapping[str, int], mapped: Set[str], num_hidden: int) -> Finding:
    """Judge the segments in /dev/shm that killed runs left.

    sizes_bytes: what each takes, by name. mapped: names that a live process has mapped. num_hidden: processes whose
    maps this user may not read.
    """
    left = {name: size for name, size in sizes_bytes.items() if name not in mapped}
    if not left:
        live = f", {len(sizes_bytes)} in use" if sizes_bytes else ""
        return ok("segments", f"no leftovers in /dev/shm{live}")
    total_bytes = sum(left.values())
    found = f"{len(left)} in /dev/shm that no process maps, {gibibytes(total_bytes)}"
    found += f" ({num_hidden} of them may not be asked)" if num_hidden else ""
    if total_bytes < _LITTLE_SHARED_BYTES and not any("-cpushm_" in name for name in left):
        return ok("segments", f"{found}: too little to matter")
    # Names hold brackets, which a shell would read as a pattern.
    largest = sorted(left, key=lambda name: left[name], reverse=True)[:_SHOWN_SEGMENTS]
    fix = "when no run is live: rm " + " ".join(f"'/dev/shm/{name}'" for name in largest)
    return Finding("warn", "segments", found, fix + (" ..." if len(left) > len(largest) else ""))


def check_open_files(soft: int, hard: int) -> Finding:
    """Judge the limit of open files. Ray raises the soft limit to 65536 where the hard one allows."""
    found = f"limit {_limit(soft)}, at most {_limit(hard)}"
    if hard == NO_LIMIT or hard >= _RAY_OPEN_FILES:
        raised = f"; Ray raises it to {_RAY_OPEN_FILES}" if soft != NO_LIMIT and soft < _RAY_OPEN_FILES else ""
        return ok("open files", found + raised)
    fix = f"raise the hard limit: docker --ulimit nofile={_RAY_OPEN_FILES}, or nofile in /etc/security/limits.conf"
    return Finding("warn", "open files", f"{found}; Ray wants {_RAY_OPEN_FILES} on a large node", fix)


def check_processes(limit: int, group_limit: int | None) -> Finding:
    """Judge how many processes and threads may be started. group_limit: the control group's, None without one."""
    limits = [number for number in (limit, group_limit) if number is not None and number != NO_LIMIT]
    lowest = min(limits, default=NO_LIMIT)
    found = f"limit {_limit(lowest)}"
    if lowest != NO_LIMIT and lowest < _FEW_PROCESSES:
        fix = f"ulimit -u {_FEW_PROCESSES * 4}, or raise the container's limit (docker: --pids-limit)"
        return Finding("warn", "processes", f"{found}; threads count, and Ray and vLLM start hundreds", fix)
    return ok("processes", found)


def check_ports(busy: Set[int]) -> Finding:
    """Judge the ports that Ray and torchrun take by default. busy: those that a program listens on."""
    taken = sorted(port for port in PORTS if port in busy)
    if not taken:
        return ok("ports", f"{', '.join(map(str, PORTS))} are free")
    fix = "; ".join(f"{port} is {PORTS[port]}" for port in taken)
    return Finding("warn", "ports", f"{', '.join(map(str, taken))} in use", fix)


def check_disk(name: str, folder: Path, free_bytes: int, writable: bool, needed: bool) -> Finding:
    """Judge the disk under a folder. needed: a run can't do without writing there."""
    found = f"{gibibytes(free_bytes)} free in {folder}"
    bad: Level = "FAIL" if needed else "warn"
    if not writable:
        return Finding(bad, name, f"{folder} can't be written to", "take another folder, or change its owner")
    if free_bytes < _LITTLE_DISK_BYTES:
        level = bad if free_bytes < _NO_DISK_BYTES else "warn"
        return Finding(level, name, f"{found}; checkpoints and models are large", "free some, or take another disk")
    return ok(name, found)


def _limit(number: int) -> str:
    return "none" if number == NO_LIMIT else str(number)
