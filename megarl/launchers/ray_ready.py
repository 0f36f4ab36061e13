"""Wait until all nodes of a Ray cluster are there: ``python -m megarl.launchers.ray_ready --nodes=4 --devices=8``."""

from __future__ import annotations

import argparse
import logging
import os
import time

from megarl.config.compose import errors_reported
from megarl.errors import ResourceError
from megarl.launchers.ray_address import RAY_ADDRESS

_POLL_S = 0.2


def wait_for_nodes(nodes: int, devices: int, wait_s: float, kind: str) -> None:
    """Return once so many nodes with so many devices each are in the cluster at RAY_ADDRESS.

    kind: GPU or CPU. Raises ResourceError with those that are there after ``wait_s``.
    """
    import ray

    deadline = time.monotonic() + wait_s
    while True:
        try:
            ray.init(os.environ[RAY_ADDRESS], logging_level=logging.ERROR, log_to_driver=False)
            break
        except (ConnectionError, RuntimeError, ValueError) as error:  # the head is still starting
            if time.monotonic() > deadline:
                raise ResourceError(f"Ray's head doesn't answer in {wait_s:g} s: {error}") from error
            time.sleep(_POLL_S)
    try:
        while True:
            found = {node["NodeName"]: float(node["Resources"].get(kind, 0)) for node in ray.nodes() if node["Alive"]}
            if sum(number >= devices for number in found.values()) >= nodes:
                return
            if time.monotonic() > deadline:
                there = ", ".join(f"{name} with {number:g} {kind}s" for name, number in sorted(found.items()))
                raise ResourceError(
                    f"Ray has {len(found)} of {nodes} nodes with {devices} {kind}s each after {wait_s:g} s: {there}. "
                    "fix: see what Ray says of the others in the job's log folder"
                )
            time.sleep(_POLL_S)
    finally:
        ray.shutdown()


def main() -> None:
    """Wait, as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m megarl.launchers.ray_ready")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--devices", type=int, required=True)
    parser.add_argument("--wait-s", type=float, default=300.0)
    parser.add_argument("--gpus", action="store_true")
    asked = parser.parse_args()
    with errors_reported():
        wait_for_nodes(asked.nodes, asked.devices, asked.wait_s, "GPU" if asked.gpus else "CPU")


if __name__ == "__main__":
    main()
