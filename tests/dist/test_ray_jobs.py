"""`ray job submit` of a run: it trains on the cluster that it is submitted to, and the command ends as the run does."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from tests.launch import Finished, python, run
from tests.tiny_task import NUM_RANKS

pytestmark = pytest.mark.long

REPOSITORY = Path(__file__).parents[2]
PINS = REPOSITORY / "requirements" / "ray_jobs.txt"
TOKEN = "0" * 64
OF_RAY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}


def free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [free.getsockname()[1] for free in sockets]
    for free in sockets:
        free.close()
    return ports


@pytest.fixture(scope="module")
def packages() -> Path | None:
    """Return a folder with Ray's dashboard, which isn't among what tests install: every Ray would start parts of it.

    None where it is installed. It is fetched once; skips the tests where pip can't.
    """
    if find_spec("aiohttp_cors") is not None:
        return None
    folder = REPOSITORY / ".venv" / f"ray-jobs-{hashlib.sha256(PINS.read_bytes()).hexdigest()[:12]}"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=folder.parent) as parent:
            install = ["install", "--quiet", "--no-deps", f"--target={parent}/found", f"--requirement={PINS}"]
            done = subprocess.run([sys.executable, "-m", "pip", *install], capture_output=True, text=True, check=False)
            if done.returncode != 0:
                pytest.skip(f"pip can't fetch {PINS.name}: {done.stderr.strip()[-200:]}")
            Path(parent, "found").rename(folder)
    return folder


@pytest.fixture(scope="module")
def cluster(tiny_task: Path, packages: Path | None) -> Iterator[str]:
    """Yield where jobs are submitted to a cluster on loopback with a core a rank, started in the task's folder."""
    gcs, dashboard, agent = free_ports(3)
    with tempfile.TemporaryDirectory(dir="/tmp") as session:  # short, for Ray's sockets
        command = python(
            *("-m", "ray.scripts.scripts", "start", "--head", "--block", "--node-ip-address=127.0.0.1"),
            *("--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
            *(f"--port={gcs}", f"--dashboard-agent-listen-port={agent}", f"--num-cpus={NUM_RANKS}", "--num-gpus=0"),
            *(f"--temp-dir={session}", "--object-store-memory=80000000", "--disable-usage-stats"),
        )
        environ = os.environ | OF_RAY | {"MEGARL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1"} | _path(packages)
        log = tiny_task / "head.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                command, cwd=tiny_task, env=environ, stdout=output, stderr=output, start_new_session=True
            )
        try:
            _wait_for(f"http://127.0.0.1:{dashboard}", process, log)
            yield f"http://127.0.0.1:{dashboard}"
        finally:
            for started in (*psutil.Process(process.pid).children(recursive=True), process):
                started.kill()  # asked to end, it would wait for half a minute
            process.wait()


def _path(packages: Path | None) -> dict[str, str]:
    return {} if packages is None else {"PYTHONPATH": str(packages)}


def _wait_for(place: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until jobs can be submitted."""
    asked = urllib.request.Request(f"{place}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"})
    deadline_s = time.monotonic() + 90
    while True:
        try:
            urllib.request.urlopen(asked).close()
            return
        except (urllib.error.URLError, ConnectionError):
            assert process.poll() is None and time.monotonic() < deadline_s, log.read_text()
            time.sleep(0.2)


@pytest.fixture
def submitted(cluster: str, packages: Path | None, tmp_path: Path) -> Callable[..., Finished]:
    """Return what submits a run with some overrides to the cluster."""
    return lambda *overrides: _submitted(cluster, packages, tmp_path, *overrides)


def _submitted(place: str, packages: Path | None, folder: Path, *overrides: str) -> Finished:
    """Return the command that submits a run, after its end; it is typed in another folder than the cluster's."""
    program = ("-m", "megarl.main_ppo", "--config-dir=.", "--config-name=rl", "trainer.total_training_steps=1")
    entry = python(*program, *overrides)
    submit = python("-m", "ray.scripts.scripts", "job", "submit", f"--address={place}", "--", *entry)
    return run(submit, folder, environ=OF_RAY | _path(packages))


def test_a_submitted_run_trains_where_the_cluster_was_started(
    submitted: Callable[..., Finished], tiny_task: Path
) -> None:
    done = submitted("trainer.run_dir=submitted", "trainer.experiment_name='two words'")
    assert done.code == 0, done.output
    lines = (tiny_task / "submitted" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines][-1] == 1
    assert "two words" in (tiny_task / "submitted" / "config.yaml").read_text()


def test_a_submitted_run_that_is_refused_says_why_and_fails_the_command(submitted: Callable[..., Finished]) -> None:
    done = submitted("trainer.run_dir=refused", "actor_rollout_ref.actor.optim.lr=-1")
    assert done.code == 1 and "actor_rollout_ref.actor.optim.lr = -1  (command line)" in done.output, done.output
    assert "Job entrypoint command failed with exit code 2" in done.output
