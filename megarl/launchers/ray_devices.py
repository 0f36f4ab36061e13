"""The GPUs of the cluster at RAY_ADDRESS, asked of its nodes: the command's own machine may have none."""

from __future__ import annotations

import logging
import os

from megarl.errors import ResourceError
from megarl.launchers.ray_address import RAY_ADDRESS, check_ray_address, named_cluster, unreachable
from megarl.launchers.starter import placed_rank
from megarl.parallel.environment import GPU, OVERRIDE, list_gpus, platform_name

_ANSWER_S = 60.0  # for a node to start a process of Ray's


def find_gpus_of_ray() -> None:
    """Have this process check, plan and start ranks for the GPUs of the cluster that RAY_ADDRESS names, if it has any.

    Sets MEGARL_PLATFORM and MEGARL_GPU. Does nothing where ranks are on this machine, where it has GPUs itself, or
    where MEGARL_PLATFORM is cpu. Raises ConfigError and ResourceError for a cluster that can't be joined, and
    ResourceError where a node with GPUs doesn't say which.
    """
    address, asked = named_cluster(), os.environ.get(OVERRIDE)
    if address is None or placed_rank() is not None or asked == "cpu":
        return
    if not asked and platform_name() == "cuda":
        return
    check_ray_address()
    if gpu := _gpu_of(address):
        os.environ |= {OVERRIDE: "cuda", GPU: gpu}


def _gpu_of(address: str) -> str | None:
    """Return the first GPU of the first node that has some, as nvidia-smi names it; None without any."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    try:
        ray.init(address, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise unreachable(address, str(error)) from error
    try:
        nodes = sorted(node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU"))
        if not nodes:
            return None
        # It takes nothing of the node's, so that it runs there also while others train.
        there = NodeAffinitySchedulingStrategy(nodes[0], soft=False)
        listed = ray.remote(list_gpus).options(num_cpus=0, scheduling_strategy=there).remote()
        return str(ray.get(listed, timeout=_ANSWER_S).splitlines()[0])
    except (ray.exceptions.RayError, IndexError) as error:
        raise ResourceError(
            f"the cluster at {RAY_ADDRESS}={address} has GPUs, but nvidia-smi on one of its nodes doesn't name them: "
            f"{error}. fix: look at nvidia-smi there; {OVERRIDE}=cpu starts ranks without GPUs"
        ) from error
    finally:
        ray.shutdown()
