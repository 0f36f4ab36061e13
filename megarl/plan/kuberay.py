"""The plan of a run as a RayJob of KubeRay: a manifest for kubectl."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from typing import Any

import yaml

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
    """Return the manifest of a plan on GPUs as YAML.

    The head is a node of the run as the others are: the controller runs on it. program: ``main_ppo``. arguments: of its
    command line. image: with megarl in it, as docker/Dockerfile makes it. What the run reads and writes is on a claim
    named megarl, which all pods have at /mnt/megarl, and where the command starts.
    """
    nodes = plan.num_ranks // plan.ranks_per_node
    environment = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    parameters = {"num-cpus": str(plan.ranks_per_node), "object-store-memory": str(_OBJECT_STORE_BYTES)}
    pod = _pod(plan, image, environment)
    workers = {
        "groupName": "nodes",
        "replicas": nodes - 1,
        "minReplicas": nodes - 1,
        "maxReplicas": nodes - 1,
        "rayStartParams": parameters,
        "template": pod,
    }
    cluster = {
        "headGroupSpec": {"rayStartParams": {**parameters, "include-dashboard": "true"}, "template": pod},
        **({"workerGroupSpecs": [workers]} if nodes > 1 else {}),
    }
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


def _pod(plan: RunPlan, image: str, environment: dict[str, str]) -> dict[str, Any]:
    gpus = plan.ranks_per_node
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
