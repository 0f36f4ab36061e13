"""`ray job submit` of a run: it trains on the cluster that it is submitted to, and the command ends as the run does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from tests.launch import Finished, python, run
from tests.tiny_task import NUM_RANKS

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(find_spec("aiohttp_cors") is None, reason="requirements/ray_jobs.txt isn't installed"),
]

TOKEN = "0" * 64
OF_RAY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}


def free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [free.getsockname()[1] for free in sockets]
    for free in sockets:
        free.close()
    return ports


@pytest.fixture(scope="module")
def cluster(tiny_task: Path) -> Iterator[str]:
    """Yield where jobs are submitted to a cluster on loopback with a core a rank, started in the task's folder."""
    gcs, dashboard, agent = free_ports(3)
    with tempfile.TemporaryDirectory(dir="/tmp") as session:  # short, for Ray's sockets
        command = python(
            *("-m", "ray.scripts.scripts", "start", "--head", "--block", "--node-ip-address=127.0.0.1"),
            *("--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
            *(f"--port={gcs}", f"--dashboard-agent-listen-port={agent}", f"--num-cpus={NUM_RANKS}", "--num-gpus=0"),
            *(f"--temp-dir={session}", "--object-store-memory=80000000", "--disable-usage-stats"),
        )
        environ = os.environ | OF_RAY | {"MEGARL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1"}
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


def submitted(place: str, folder: Path, *overrides: str) -> Finished:
    """Return the command that submits a run, after its end; it is typed in another folder than the cluster's."""
    program = ("-m", "megarl.main_ppo", "--config-dir=.", "--config-name=rl", "trainer.total_training_steps=1")
    entry = python(*program, *overrides)
    submit = python("-m", "ray.scripts.scripts", "job", "submit", f"--address={place}", "--", *entry)
    return run(submit, folder, environ=OF_RAY)


def test_a_submitted_run_trains_where_the_cluster_was_started(cluster: str, tiny_task: Path, tmp_path: Path) -> None:
    done = submitted(cluster, tmp_path, "trainer.run_dir=submitted", "trainer.experiment_name='two words'")
    assert done.code == 0, done.output
    lines = (tiny_task / "submitted" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines][-1] == 1
    assert "two words" in (tiny_task / "submitted" / "config.yaml").read_text()


def test_a_submitted_run_that_is_refused_says_why_and_fails_the_command(cluster: str, tmp_path: Path) -> None:
    done = submitted(cluster, tmp_path, "trainer.run_dir=refused", "actor_rollout_ref.actor.optim.lr=-1")
    assert done.code == 1 and "actor_rollout_ref.actor.optim.lr = -1  (command line)" in done.output, done.output
    assert "Job entrypoint command failed with exit code 2" in done.output
