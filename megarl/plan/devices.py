"""What a plan takes a device to be: its memory and speeds, each figure with its source. Standard library only."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from megarl.errors import ConfigError, Problem, nearest
from megarl.parallel.environment import GPU, list_gpus, platform_name

CPU = "cpu"

_GIB = 2**30

# The limits that a container puts on memory: cgroup version 2, then 1. Absent outside containers and on other systems.
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_MEMORY_INFO = Path("/proc/meminfo")

# Ray ends ranks where the machine's memory is in use beyond this share.
RAY_MEMORY_SHARE = 0.95
# Measured on a tiny run: the controller 0.3 GiB, Ray's processes 0.2; its object store may take 0.2, rewards the rest.
BESIDE_RANKS_BYTES = 1 * _GIB


@dataclass(frozen=True)
class Device:
    """One device of a rank.

    marketed: the memory as its maker sells it, for people; no plan computes with it.
    memory_bytes: all memory that a process finds (cudaMemGetInfo's total, the "total capacity" of PyTorch's message
        for lack of memory): less than marketed, before the CUDA context and NCCL take their part. Drivers and ECC
        move it by up to 0.3 %; the smallest figure seen is given.
    bf16_flops_per_s: dense matrix products, without the sparsity that doubles the figure on the cover of a datasheet.
    memory_bytes_per_s: of the device's own memory.
    link_bytes_per_s: to another device of the node (NVLink, else PCIe), one direction.
    host_link_bytes_per_s: to the host's memory, one direction.
    inter_node_bytes_per_s: to a device of another node, one direction. No property of the device: assumed.
    source: of the speeds; memory_source, inter_node_source: of those figures.
    """

    name: str
    marketed: str
    memory_bytes: int
    bf16_flops_per_s: float
    memory_bytes_per_s: float
    link_bytes_per_s: float
    host_link_bytes_per_s: float
    inter_node_bytes_per_s: float
    source: str
    memory_source: str
    inter_node_source: str


def _gpu(
    name: str,
    marketed: str,
    *,
    memory_gib: float,
    tflops: float,
    memory_gb_per_s: float,
    link_gb_per_s: float,
    host_gb_per_s: float,
    inter_node_gbit_per_s: float,
    source: str,
    memory_source: str = "",
    network: str,
) -> Device:
    """Return a device from figures in the units that datasheets use: GB is 1e9 bytes, GiB 2**30, Gbit 1e9 bits."""
    return Device(
        name=name,
        marketed=marketed,
        memory_bytes=int(memory_gib * _GIB),
        bf16_flops_per_s=tflops * 1e12,
        memory_bytes_per_s=memory_gb_per_s * 1e9,
        link_bytes_per_s=link_gb_per_s * 1e9,
        host_link_bytes_per_s=host_gb_per_s * 1e9,
        inter_node_bytes_per_s=inter_node_gbit_per_s / 8 * 1e9,
        source=source,
        memory_source=memory_source or f"{memory_gib} GiB: total capacity in PyTorch's out-of-memory messages",
        inter_node_source=f"assumed: {network}",
    )


_HDR = "one 200 Gbit/s adapter a GPU, as in NVIDIA's DGX A100 datasheet"
_NDR = "one 400 Gbit/s adapter a GPU, as in NVIDIA's DGX H100, H200 and B200 datasheets"

# Datasheets add up both directions of NVLink and PCIe; half of their figure stands here.
_GPUS = (
    _gpu(
        "A100-40",
        "40 GB",
        memory_gib=39.38,
        tflops=312,
        memory_gb_per_s=1555,
        link_gb_per_s=300,
        host_gb_per_s=32,
        inter_node_gbit_per_s=200,
        source="NVIDIA A100 Tensor Core GPU datasheet, SXM 40 GB",
        network=_HDR,
    ),
    _gpu(
        "A100-80",
        "80 GB",
        memory_gib=79.14,
        tflops=312,
        memory_gb_per_s=2039,
        link_gb_per_s=300,
        host_gb_per_s=32,
        inter_node_gbit_per_s=200,
        source="NVIDIA A100 Tensor Core GPU datasheet, SXM 80 GB",
        network=_HDR,
    ),
    _gpu(
        "H100",
        "80 GB",
        memory_gib=79.1,
        tflops=989.4,
        memory_gb_per_s=3350,
        link_gb_per_s=450,
        host_gb_per_s=64,
        inter_node_gbit_per_s=400,
        source="NVIDIA H100 Tensor Core GPU datasheet and architecture whitepaper, SXM5",
        network=_NDR,
    ),
    _gpu(
        "H800",
        "80 GB",
        memory_gib=79.1,
        tflops=989.4,
        memory_gb_per_s=3350,
        link_gb_per_s=200,
        host_gb_per_s=64,
        inter_node_gbit_per_s=400,
        source="an H100 SXM5 whose NVLink is cut to 400 GB/s, as its makers' server datasheets say",
        memory_source="taken to be an H100's",
        network=_NDR,
    ),
    _gpu(
        "H200",
        "141 GB",
        memory_gib=139.7,
        tflops=989.4,
        memory_gb_per_s=4800,
        link_gb_per_s=450,
        host_gb_per_s=64,
        inter_node_gbit_per_s=400,
        source="NVIDIA H200 Tensor Core GPU datasheet, SXM",
        network=_NDR,
    ),
    _gpu(
        "H20",
        "96 GB",
        memory_gib=95.0,
        tflops=148,
        memory_gb_per_s=4000,
        link_gb_per_s=450,
        host_gb_per_s=64,
        inter_node_gbit_per_s=400,
        source="H20 figures of server makers; NVIDIA publishes no datasheet",
        network=_NDR,
    ),
    _gpu(
        "H20-141",
        "141 GB",
        memory_gib=139.7,
        tflops=148,
        memory_gb_per_s=4800,
        link_gb_per_s=450,
        host_gb_per_s=64,
        inter_node_gbit_per_s=400,
        source="H20-3e figures of server makers; NVIDIA publishes no datasheet; HBM3e bandwidth taken to be an H200's",
        memory_source="taken to be an H200's",
        network=_NDR,
    ),
    _gpu(
        "B200",
        "180 GB",
        memory_gib=178.35,
        tflops=2250,
        memory_gb_per_s=8000,
        link_gb_per_s=900,
        host_gb_per_s=64,
        inter_node_gbit_per_s=400,
        source="NVIDIA DGX B200 datasheet and Blackwell architecture brief, HGX B200",
        network=_NDR,
    ),
    _gpu(
        "GB200",
        "186 GB",
        memory_gib=184.3,
        tflops=2500,
        memory_gb_per_s=8000,
        link_gb_per_s=900,
        # NVLink-C2C gives a Grace CPU 450 GB/s in each direction, for two GPUs.
        host_gb_per_s=225,
        inter_node_gbit_per_s=400,
        source="NVIDIA GB200 NVL72 datasheet; its 72 GPUs share one NVLink domain, which may hold several nodes",
        network="one 400 Gbit/s adapter a GPU between NVLink domains",
    ),
    _gpu(
        "L40S",
        "48 GB",
        memory_gib=44.34,
        tflops=362.05,
        memory_gb_per_s=864,
        link_gb_per_s=32,
        host_gb_per_s=32,
        inter_node_gbit_per_s=200,
        source="NVIDIA L40S datasheet; no NVLink, so PCIe Gen4 x16 links the devices of a node",
        network="200 Gbit/s a GPU",
    ),
)

DEVICES: dict[str, Device] = {gpu.name: gpu for gpu in _GPUS}


def device(name: str, ranks_per_node: int = 1, key: str = "device") -> Device:
    """Return the device called ``name``, whatever the case, or this machine as seen by one rank where it is ``cpu``.

    ranks_per_node: ranks that share the machine; a GPU is never shared.
    key: the setting that names the device, for the error.
    Raises ConfigError for a name that is not known.
    """
    if name.lower() == CPU:
        return cpu_device(ranks_per_node)
    by_lower = {gpu.name.lower(): gpu for gpu in _GPUS}
    if found := by_lower.get(name.lower()):
        return found
    fix = nearest(name.lower(), [CPU, *by_lower])
    raise ConfigError([Problem(key, name, f"must be one of {', '.join([*DEVICES, CPU])}", fix=fix)])


def this_device(ranks_per_node: int) -> Device:
    """Return the device that a rank runs on: the first GPU, as nvidia-smi names it, or a share of this machine.

    The GPU is this machine's, or that which MEGARL_GPU names of another, where ranks are to run. One that isn't known
    has the speeds of the known one with the nearest memory.
    """
    if platform_name() == CPU:
        return cpu_device(ranks_per_node)
    return device_of_gpu(os.environ.get(GPU) or list_gpus().splitlines()[0])


def device_of_gpu(line: str) -> Device:
    """Return the device that a line ``name, MiB`` of nvidia-smi tells of."""
    name, _, mebibytes = line.rpartition(",")
    memory_bytes = int(mebibytes) * 2**20
    words = name.upper().replace("-", " ").split()
    known = [gpu for gpu in _GPUS if gpu.name.split("-")[0].upper() in words] or list(_GPUS)
    nearest_gpu = min(known, key=lambda gpu: abs(gpu.memory_bytes - memory_bytes))
    return replace(nearest_gpu, name=name.strip(), memory_bytes=memory_bytes, memory_source="nvidia-smi")


def cpu_device(ranks_per_node: int = 1) -> Device:
    """Return this machine as a device of one of ``ranks_per_node`` ranks, who share memory, cores and bandwidth evenly.

    The memory is what Ray lets processes hold, less what others hold now and what a run holds beside its ranks. The
    speeds are rough, for a laptop's core, and say so.
    """
    assert ranks_per_node > 0, f"{ranks_per_node} ranks on a machine"
    total_bytes, held_bytes = machine_memory_bytes(), held_memory_bytes()
    cores = (os.cpu_count() or 1) / ranks_per_node
    assumed = "assumed, not measured"
    return Device(
        name=CPU,
        marketed=f"{total_bytes / _GIB:.1f} GiB / {ranks_per_node} ranks",
        memory_bytes=bytes_for_ranks(total_bytes, held_bytes) // ranks_per_node,
        bf16_flops_per_s=cores * 3e10,
        memory_bytes_per_s=2e10 / ranks_per_node,
        link_bytes_per_s=1e9 / ranks_per_node,
        host_link_bytes_per_s=5e9 / ranks_per_node,
        inter_node_bytes_per_s=1e8 / ranks_per_node,
        source=f"{assumed}: 3e10 flops/s a core, 20 GB/s of memory, gloo over loopback 1 GB/s, copies 5 GB/s a machine",
        memory_source=(
            f"{RAY_MEMORY_SHARE:.0%} of the machine's memory or of its container's limit, above which Ray ends ranks, "
            f"less {held_bytes / _GIB:.1f} GiB that others hold now and {BESIDE_RANKS_BYTES / _GIB:g} GiB for the "
            "controller, rewards and Ray, divided over the ranks"
        ),
        inter_node_source=f"{assumed}: a 1 Gbit/s network, of which 100 MB/s arrive",
    )


def bytes_for_ranks(total_bytes: int, held_bytes: int) -> int:
    """Return the bytes of a machine's memory that ranks may hold before Ray ends one, beside what others hold."""
    return max(0, int(RAY_MEMORY_SHARE * total_bytes) - held_bytes - BESIDE_RANKS_BYTES)


def machine_memory_bytes() -> int:
    """Return the memory of this machine, or the limit of the container it runs in where that is less."""
    return min([_physical_memory_bytes(), *filter(None, map(_limit_bytes, _CGROUP_LIMITS))])


def _physical_memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _limit_bytes(path: Path) -> int | None:
    """Return the number in a file of limits, None without a file or a limit."""
    text = path.read_text().strip() if path.is_file() else ""
    return int(text) if text.isdigit() else None


def held_memory_bytes(info: Path = _MEMORY_INFO) -> int:
    """Return the memory that processes hold on this machine, in its container where that has a limit; 0 where unknown.

    What the system only keeps at hand, and gives away when asked, doesn't count.
    """
    total = _physical_memory_bytes()
    for path in _CGROUP_LIMITS:
        limit = _limit_bytes(path)
        if limit is not None and limit < total and (held := held_in_group(path.parent)) is not None:
            return held
    if not info.is_file():
        return 0
    kibibytes = {
        name: int(value.split()[0]) for name, _, value in (s.partition(":") for s in info.open()) if value.split()
    }
    return (kibibytes["MemTotal"] - kibibytes["MemAvailable"]) * 1024


def held_in_group(folder: Path) -> int | None:
    """Return the bytes that a control group holds, None where it has no files that tell."""
    used = next((folder / n for n in ("memory.current", "memory.usage_in_bytes") if (folder / n).is_file()), None)
    stat = folder / "memory.stat"
    if used is None or not stat.is_file():
        return None
    parts = dict(line.split() for line in stat.read_text().splitlines())
    return max(0, int(used.read_text()) - int(parts.get("total_inactive_file", parts.get("inactive_file", "0"))))
