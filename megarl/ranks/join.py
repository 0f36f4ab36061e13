"""How a process becomes a rank: environment, then platform, then the store through which ranks find each other."""

from __future__ import annotations

import faulthandler
import os
import socket
from collections.abc import Collection
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from megarl.parallel.environment import apply_environment
from megarl.parallel.importing import heavy_imports
from megarl.parallel.numa import bind_near
from megarl.ranks.meeting import store_of_ranks
from megarl.ranks.spec import RankSpec
from megarl.ranks.watched import START_S

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

    from megarl.parallel.platform import Platform
    from megarl.ranks.worker import Worker

_REPORT_S = 30.0  # for the controller to say first where all ranks stand


def join_ranks(listener: socket.socket | None = None) -> Platform:
    """Prepare this process and join the other ranks. RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT are set.

    listener: rank 0's, at MASTER_ADDR and MASTER_PORT; None where that is to be opened, or torchrun has.
    """
    apply_environment()
    faulthandler.enable()  # gloo ends a process whose peer sends another shape from a thread of its own
    with heavy_imports():
        import torch
        import torch.distributed as dist

        from megarl.parallel.platform import install_platform

        platform = install_platform()
    platform.set_device(int(os.environ["LOCAL_RANK"]))
    if platform.name == "cpu":
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    store = store_of_ranks(listener)
    # Not its device: with one torch splits every later group off this one, in which all ranks must take part, and those
    # of a group for gloo, which Megatron and vLLM make, don't. Until start_worker no collective runs on devices.
    dist.init_process_group(
        platform.backend, store=store, rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"])
    )
    platform.agree_on_products()
    return platform


def start_worker(spec: RankSpec, platform: Platform) -> Worker:
    """Return this rank's Worker, after ``join_ranks``."""
    with heavy_imports():
        import torch

        from megarl.ranks.worker import Worker

    # NCCL's limit for the world would be ten minutes, which ranks that load from a slow disk may be apart.
    limit_collectives(max(spec.hang_timeout_s, START_S) + _REPORT_S)
    if platform.name == "cuda" and any(role.residency.optimizer_on_host for role in spec.roles):
        num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ["WORLD_SIZE"])
        torch.set_num_threads(host_threads(len(os.sched_getaffinity(0)), num_ranks))
    if platform.name == "cuda" and spec.numa_binding:
        bind_near(pci_address(platform.device(int(os.environ["LOCAL_RANK"]))))
    worker = Worker(spec, platform.device(int(os.environ["LOCAL_RANK"])))
    limit_collectives(spec.hang_timeout_s + _REPORT_S)
    return worker


def pci_address(device: torch.device) -> str:
    """Return where a GPU is, as the kernel names it."""
    import torch

    found: Any = torch.cuda.get_device_properties(device)
    return f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"


def host_threads(num_cores: int, num_ranks: int) -> int:
    """Return the threads of a rank that steps on the host, as an int: its even share of the node's cores.

    Ray and torchrun set OMP_NUM_THREADS to 1, for ranks whose devices do the work.
    """
    return max(1, num_cores // num_ranks)


def limit_collectives(timeout_s: float, groups: Collection[ProcessGroup] | None = None) -> None:
    """Have a collective of some groups, of all that there are unless they are given, fail after ``timeout_s``.

    Each library gives the groups that it makes a limit of its own: torch and Megatron half an hour.
    """
    import torch.distributed as dist

    for group in dist.distributed_c10d._world.pg_map.copy() if groups is None else groups:
        for device in group._device_types:
            group._get_backend(device)._set_default_timeout(timedelta(seconds=timeout_s))
