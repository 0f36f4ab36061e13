"""The plan of a run as a RayJob of KubeRay: a manifest for kubectl."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from typing import Any

import yaml

from megarl.errors import ConfigError, Problem
from megarl.plan.memory import GIB
from megarl.plan.run_plan import RunPlan

_OBJECT_STORE_BYTES = 1_000_000_000
_SHARED_MEMORY_GIB = 64  # NCCL, Ray's object store, vLLM
_SPARE_GIB = 16  # of a node beside its ranks: Ray's own processes, the controller
_VOLUME = "/mnt/megarl"


class _Dumper(yaml.SafeDumper):
    """Writes what is there twice twice: people read the manifest, and change one of the two."""

    def ignore_aliases(self, data: object) -> bool:
        """Return True, for all data."""
        return True


def kuberay_manifest(plan: RunPlan, program: str, arguments: Sequence[str], image: str) -> str:
    """Return the manifest of a plan on GPUs as YAML. Raises ConfigError for engines on the trainer's devices.

    The head is a node of the run as the others are: the controller runs on it. Engines in processes of their own have
    nodes of their own. program: ``main_ppo``. arguments: of its
    command line. image: with megarl in it, as docker/Dockerfile makes it. What the run reads and writes is on a claim
    named megarl, which all pods have at /mnt/megarl, and where the command starts.
    """
    if plan.is_served and plan.shares_devices:
        key, why = "actor_rollout_ref.rollout.n_gpus_per_node", "a device of a cluster is given to one process alone"
        raise ConfigError([Problem(key, 0, f"must be at least 1 in a manifest: {why}", f"{key}=null")])
    nodes = plan.num_ranks // plan.ranks_per_node
    environment = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    head = _node(plan, plan.ranks_per_node, image, environment)
    head["rayStartParams"]["include-dashboard"] = "true"
    workers = [("nodes", nodes - 1, plan.ranks_per_node)]
    if plan.is_served:
        workers.append(("engines", plan.engine_nodes, plan.num_engines * plan.engine_layout.tp // plan.engine_nodes))
    groups = [
        {
            "groupName": name,
            "replicas": number,
            "minReplicas": number,
            "maxReplicas": number,
            **_node(plan, gpus, image, environment),
        }
        for name, number, gpus in workers
        if number
    ]
    cluster = {"headGroupSpec": head, **({"workerGroupSpecs": groups} if groups else {})}
    manifest = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": "megarl"},
        "spec": {
            # One command: KubeRay has a shell read the line, which would run what follows an && itself.
            "entrypoint": f"python -m megarl.{program} {shlex.join(arguments)}",
            "shutdownAfterJobFinishes": True,
            "backoffLimit": 3,
            "rayClusterSpec": cluster,
        },
    }
    return yaml.dump(manifest, Dumper=_Dumper, sort_keys=False, width=120)


def _node(plan: RunPlan, gpus: int, image: str, environment: dict[str, str]) -> dict[str, Any]:
    """Return a node of so many GPUs, as a group of Ray's has it."""
    parameters = {"num-cpus": str(gpus), "object-store-memory": str(_OBJECT_STORE_BYTES)}
    return {"rayStartParams": parameters, "template": _pod(plan, gpus, image, environment)}


def _pod(plan: RunPlan, gpus: int, image: str, environment: dict[str, str]) -> dict[str, Any]:
    memory = math.ceil(plan.host_bytes_per_node / GIB) + _SHARED_MEMORY_GIB + _SPARE_GIB
    limits = {"nvidia.com/gpu": gpus, "memory": f"{memory}Gi", "cpu": 2 * gpus}
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}, {"name": "megarl", "mountPath": _VOLUME}]
    container = {
        "name": "ray",
        "image": image,
        "workingDir": _VOLUME,
        "env": [{"name": name, "value": value} for name, value in environment.items()],
        "resources": {"limits": limits, "requests": limits},
        "volumeMounts": mounts,
    }
    volumes = [
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{_SHARED_MEMORY_GIB}Gi"}},
        {"name": "megarl", "persistentVolumeClaim": {"claimName": "megarl"}},
    ]
    return {"spec": {"containers": [container], "volumes": volumes}}
