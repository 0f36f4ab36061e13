"""Reads the machine: what is installed, mapped, listened on, and what control groups allow. Judges nothing."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterable, Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from packaging.utils import canonicalize_name

from megarl.doctor.accelerator import GPU_QUERY, Build, build_of
from megarl.doctor.limits import Memory
from megarl.doctor.packages import Package

_SEGMENT = re.compile(r".*-cpushm_\d+|psm_\w+|sgl_shm_mq_\w+")
_SMI_S = 20.0  # a driver that is stuck hangs its tool
_CGROUP = Path("/sys/fs/cgroup")


def read_packages() -> dict[str, Package]:
    """Return the installed distributions by canonical name; of two with one name, the one that Python would import."""
    found: dict[str, Package] = {}
    for distribution in metadata.distributions():
        about = distribution.metadata
        name = about["Name"]
        # A folder that a broken install left has no name.
        if name and canonicalize_name(name) not in found:
            found[canonicalize_name(name)] = Package(
                about["Version"] or "unknown",
                tuple(about.get_all("Requires-Dist") or ()),
                about["Requires-Python"] or "",
                "root-is-purelib: false" not in (distribution.read_text("WHEEL") or "").lower(),
            )
    return found


def folder_of(module: str) -> Path | None:
    """Return the folder that ``import module`` would load from, without loading it; None where there is none."""
    spec = find_spec(module)
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None


def is_importable(module: str) -> bool:
    """Whether a top-level module is on the path, compiled ones included."""
    return find_spec(module) is not None


def read_build(module: str) -> Build | None:
    """Return the build that a package's version.py names, None without package or file."""
    folder = folder_of(module)
    source = folder / "version.py" if folder else None
    return build_of(source.read_text(encoding="utf-8")) if source and source.is_file() else None


def read_gpus() -> tuple[str, str]:
    """Return the text that nvidia-smi lists, and its error. Both are empty where there is no such tool."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "", ""
    query = [tool, f"--query-gpu={GPU_QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=_SMI_S)
    except subprocess.TimeoutExpired:
        return "", f"nvidia-smi gave no answer in {_SMI_S:g} s"
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()
        return "", said[0] if said else f"nvidia-smi ended with code {done.returncode}"
    return done.stdout, ""


def group_limit(controller: str, unified: str, legacy: str, membership: str, root: Path = _CGROUP) -> str | None:
    """Return the lowest limit that this process's control group and those above it set, or None.

    unified, legacy: names of the limit's file in version 2 and 1 of control groups, such as ``memory.max``.
    membership: the text of /proc/self/cgroup, lines ``number:controllers:path``.
    """
    limits = []
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, file = root, unified
        elif controller in controllers.split(","):
            base, file = root / controller, legacy
        else:
            continue
        folder = base / path.lstrip("/")
        for parent in (folder, *folder.parents):
            limit = parent / file
            if parent.is_relative_to(base) and limit.is_file():
                limits.append(limit.read_text().strip())
    numbers = [limit for limit in limits if limit.split()[0].isdigit()]  # without a limit: max, or -1
    return min(numbers, key=_ratio, default=None)


def _ratio(limit: str) -> float:
    """Return a limit as a number: cpu.max holds two, time and period."""
    first, *period = limit.split()
    return int(first) / int(period[0]) if period else float(first)


def read_membership() -> str:
    """Return the text of /proc/self/cgroup, empty where the system has none."""
    path = Path("/proc/self/cgroup")
    return path.read_text() if path.is_file() else ""


def read_memory(membership: str) -> Memory:
    """Return the size of host memory, what is available, and the control group's limit."""
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    total = available = os.sysconf("SC_PHYS_PAGES") * page_bytes
    info = Path("/proc/meminfo")
    if info.is_file() and (line := re.search(r"^MemAvailable: *(\d+) kB", info.read_text(), re.MULTILINE)):
        available = int(line[1]) * 1024
    limit = group_limit("memory", "memory.max", "memory.limit_in_bytes", membership)
    return Memory(total, available, int(limit) if limit else None)


def read_cores(membership: str) -> tuple[int, float | None]:
    """Return the cores this process may run on, and how many of them its control group lets it use at once."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = group_limit("cpu", "cpu.max", "cpu.cfs_quota_us", membership)
    if limit is None:
        return cores, None
    if " " in limit:
        return cores, _ratio(limit)
    period = group_limit("cpu", "cpu.max", "cpu.cfs_period_us", membership)
    return cores, int(limit) / int(period) if period else None


def read_segments(folder: Path) -> dict[str, int]:
    """Return the bytes of memory behind each segment in a folder that an engine, or Python for one, made."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return {path.name: path.stat().st_blocks * 512 for path in paths if _SEGMENT.fullmatch(path.name)}


def mapped_names(folder: Path, processes: Path = Path("/proc")) -> tuple[set[str], int]:
    """Return the names of a folder's files that live processes have mapped, and how many processes hid theirs."""
    names: set[str] = set()
    num_hidden = 0
    mapped = re.compile(rf" {re.escape(str(folder))}/(.+?)(?: \(deleted\))?$", re.MULTILINE)
    for maps in processes.glob("[0-9]*/maps"):
        try:
            names.update(mapped.findall(maps.read_text()))
        except PermissionError:
            num_hidden += 1
        except (FileNotFoundError, ProcessLookupError):  # it has ended, and maps nothing any more
            continue
    return names, num_hidden


def busy_ports(ports: Iterable[int]) -> set[int]:
    """Return those of ``ports`` that a program listens on, at whatever address of this machine."""
    busy = set()
    for port in ports:
        with socket.socket() as probe:
            # Connections that have just ended don't count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                busy.add(port)
    return busy


def hub_cache(environ: Mapping[str, str], home: Path) -> Path:
    """Return the folder that huggingface_hub keeps models in."""
    if cache := environ.get("HF_HUB_CACHE"):
        return Path(cache).expanduser()
    if hf_home := environ.get("HF_HOME"):
        return Path(hf_home).expanduser() / "hub"
    return Path(environ.get("XDG_CACHE_HOME") or home / ".cache").expanduser() / "huggingface" / "hub"


def nearest_existing(path: Path) -> Path:
    """Return ``path``, or the nearest folder above it that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())
