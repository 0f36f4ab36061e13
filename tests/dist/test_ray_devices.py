"""A command on a machine without GPUs, that joins a cluster which has some, prepares ranks for them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megarl.parallel.environment import GPU, OVERRIDE
from megarl.plan.devices import DEVICES, this_device

pytestmark = pytest.mark.long  # a cluster each

# As megarl's own: on loopback, with a token.
OF_RAY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
COMMAND = f"""
import os
from megarl.errors import ResourceError
from megarl.launchers.ray_devices import find_gpus_of_ray
try:
    find_gpus_of_ray()
except ResourceError as error:
    print("ResourceError:", error)
print(os.environ.get("{OVERRIDE}"), os.environ.get("{GPU}"), sep="|")
"""
LINES = {"names its GPUs": "NVIDIA H100 80GB HBM3, 81559\nNVIDIA H100 80GB HBM3, 81559", "names none": ""}


@contextmanager
def node(num_gpus: int, smi: Path) -> Iterator[str]:
    """Yield the address of a cluster of one node, in which alone there is an nvidia-smi."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(dir="/tmp") as session:  # short, for Ray's sockets
        command = (
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--include-dashboard=false"),
            *("--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=1", f"--num-gpus={num_gpus}"),
            *(f"--temp-dir={session}", "--object-store-memory=80000000", "--disable-usage-stats"),
        )
        environ = os.environ | OF_RAY | {"PATH": f"{smi}:{os.environ['PATH']}"}
        quiet = subprocess.DEVNULL
        with subprocess.Popen(command, stdout=quiet, stderr=quiet, env=environ, start_new_session=True) as process:
            try:
                _wait_for(port)
                yield f"127.0.0.1:{port}"
            finally:
                os.killpg(process.pid, signal.SIGTERM)


def _wait_for(port: int) -> None:
    deadline_s = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except ConnectionRefusedError:
            assert time.monotonic() < deadline_s, "the cluster's head doesn't listen"
            time.sleep(0.1)


def found_by_a_command(address: str, **variables: str) -> str:
    """Return the last line of what a command finds that is started beside the cluster."""
    environ = {name: value for name, value in os.environ.items() if name not in (OVERRIDE, GPU)}
    environ |= OF_RAY | {"RAY_ADDRESS": address} | variables
    done = subprocess.run(
        [sys.executable, "-c", COMMAND], env=environ, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def nvidia_smi(folder: Path, lines: str) -> Path:
    """Write an nvidia-smi that lists these GPUs; return its folder."""
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nprintf '%s' '{lines}'\n")
    tool.chmod(0o755)
    return folder


def test_a_command_without_gpus_plans_and_starts_ranks_on_those_of_the_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with node(2, nvidia_smi(tmp_path, LINES["names its GPUs"])) as address:
        found = found_by_a_command(address)
        assert found == "cuda|NVIDIA H100 80GB HBM3, 81559"
        assert found_by_a_command(address, **{OVERRIDE: "cuda"}) == found
        assert found_by_a_command(address, **{OVERRIDE: "cpu"}) == "cpu|None"
    platform, gpu = found.split("|")
    monkeypatch.setenv(OVERRIDE, platform)
    monkeypatch.setenv(GPU, gpu)
    device = this_device(8)
    assert (device.name, device.memory_bytes) == ("NVIDIA H100 80GB HBM3", 81559 * 2**20)
    assert device.bf16_flops_per_s == DEVICES["H100"].bf16_flops_per_s


def test_gpus_that_their_node_does_not_name_are_an_error(tmp_path: Path) -> None:
    with node(1, nvidia_smi(tmp_path, LINES["names none"])) as address:
        said = found_by_a_command(address)
    assert f"RAY_ADDRESS={address} has GPUs, but nvidia-smi on one of its nodes doesn't name them" in said
    assert "fix: look at nvidia-smi there" in said


def test_a_cluster_without_gpus_leaves_the_platform_alone(tmp_path: Path) -> None:
    with node(0, tmp_path) as address:
        assert found_by_a_command(address) == "None|None"
