"""A real Slurm of several nodes on one machine: for root, with Debian's slurm-wlm and munge.

One set of namespaces is the cluster: a bridge, munged, slurmctld. Each node is another set within it, with its own host
name, address, process space, temporary folder, shared memory and slurmd. All that it writes is in one folder, and
killing one process ends everything. Run as a script, this file is the first process of a set of namespaces.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

NETWORK = "10.231.0"
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "unshare", "nsenter", "ip")
_UNSHARE = ("unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
_WAIT_S = 30.0
_DONE = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY")
_CONF = """\
ClusterName=mini
SlurmctldHost=ctl({network}.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
MpiDefault=none
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
GresTypes=gpu
ReturnToService=2
KillWait=5
SlurmdTimeout=15
UnkillableStepTimeout=30
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdPidFile={folder}/node/%n/slurmd.pid
SlurmdSpoolDir={folder}/node/%n/spool
SlurmdLogFile={folder}/log/slurmd.%n.log
PropagateResourceLimitsExcept=MEMLOCK
NodeName=node[1-{nodes}] CPUs=128 RealMemory=2000000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


@dataclass(frozen=True)
class Job:
    """A job that has ended. restarts: how often it was queued again."""

    number: str
    state: str
    restarts: int
    output: str


class MiniSlurm:
    """The cluster in ``folder``, from ``start`` to ``stop``. Nodes are node1, node2, ...

    shared: folders that all nodes see, as they do small, a disk with room for one checkpoint of the tiny task; all else
    below the temporary folder is each node's own.
    """

    def __init__(self, folder: Path, shared: Sequence[Path], nodes: int = 2, gpus: int = 8) -> None:
        self.folder, self.shared, self.nodes, self.gpus = folder, tuple(shared), nodes, gpus
        self.small = folder / "small"
        self.environ = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        """Bring up the cluster, until all nodes are idle."""
        self._write()
        log = (self.folder / "log" / "cluster.log").open("w")
        command = [*_UNSHARE, sys.executable, __file__, "cluster", str(self.folder), str(self.nodes)]
        self.process = subprocess.Popen(
            [*command, *map(str, self.shared)], env=self.environ, stdout=log, stderr=log, start_new_session=True
        )
        self.wait_for_nodes(self.nodes)

    def wait_for_nodes(self, number: int) -> None:
        """Wait until so many nodes are idle."""
        deadline = time.monotonic() + _WAIT_S
        while time.monotonic() < deadline:
            if (self.folder / "ready").exists():
                found = self.on_login("sinfo", "--noheader", "--states=idle", "--format=%D")
                if found.stdout.strip() == str(number):
                    return
            time.sleep(0.1)
        logs = "\n".join(path.read_text()[-500:] for path in sorted((self.folder / "log").iterdir()))
        raise TimeoutError(f"not {number} nodes in {_WAIT_S:g} s:\n{logs}")

    def stop(self) -> None:
        """End all that runs in the cluster."""
        self.process.kill()
        self.process.wait()

    def on_login(
        self, *command: str, folder: Path | None = None, environ: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the login node, which is the controller's."""
        [first] = _children(self.process.pid)
        entered = ["nsenter", "-t", str(first), "-n", "-u", "-i", "-m", "-p", f"--wd={folder or self.folder}"]
        return subprocess.run(
            [*entered, *command], env={**self.environ, **(environ or {})}, capture_output=True, text=True, check=False
        )

    def on_node(self, node: int, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command on a node, outside of Slurm."""
        return subprocess.run(
            [*self._entered(node), *command], env=self.environ, capture_output=True, text=True, check=False
        )

    @contextmanager
    def started_on(self, node: int, *command: str) -> Iterator[subprocess.Popen[str]]:
        """Have a command run on a node, outside of Slurm, to the end of the block."""
        process = subprocess.Popen(
            [*self._entered(node), *command],
            env=self.environ,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

    def submit(self, folder: Path, *arguments: str, environ: Mapping[str, str] | None = None) -> str:
        """Submit a script from a folder, and return the number of the job."""
        done = self.on_login("sbatch", "--parsable", *arguments, folder=folder, environ=environ)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def state(self, number: str) -> dict[str, str]:
        """Return what Slurm says of a job, by name."""
        text = self.on_login("scontrol", "show", "job", "--oneliner", number).stdout
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def wait(self, number: str, folder: Path, timeout_s: float = 60.0) -> Job:
        """Return a job once it has ended; one that is queued again goes on at once."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            state = self.state(number)
            if state.get("JobState") in _DONE:
                time.sleep(1)  # a job that is queued again passes through its failure
                if self.state(number).get("JobState") in _DONE:
                    break
            if state.get("JobState") == "PENDING" and state.get("Restarts", "0") != "0":
                self.on_login("scontrol", "update", f"JobId={number}", "StartTime=now")
            time.sleep(0.2)
        else:
            self.on_login("scancel", number)
        state = self.state(number)
        output = "".join(path.read_text() for path in sorted(folder.glob(f"*-{number}.log")))
        return Job(number, state.get("JobState", ""), int(state.get("Restarts", "0")), output)

    def cut_power(self, node: int) -> None:
        """End a node without a word: its peers see silence, no closed connection."""
        first = self._first_of(node)
        self.on_login("ip", "link", "delete", f"v{node}")
        os.kill(first, signal.SIGKILL)

    def boot(self, node: int) -> None:
        """Bring up a node again."""
        with (self.folder / "boot").open("w") as boot:
            boot.write(f"{node}\n")

    def restart_slurmd(self, node: int) -> None:
        """Kill a node's slurmd, which the node starts again."""
        done = self.on_node(node, "pkill", "--exact", "--signal", "KILL", "slurmd")
        assert done.returncode == 0, done.stderr

    def processes(self) -> list[str]:
        """Return the commands that run on the nodes, without those of the cluster itself."""
        own = ("slurm", "munged", "unshare")
        found = []
        for number in _below(self.process.pid):
            command = _command(number)
            if command and not any(name in command for name in own):
                found.append(command)
        return found

    def _write(self) -> None:
        for name in ("log", "state", "munge", "dev", self.small.name):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "munge").chmod(0o700)
        (self.folder / "munge" / "key").write_bytes(secrets.token_bytes(1024))
        (self.folder / "munge" / "key").chmod(0o600)
        addresses = [f"{NETWORK}.1 ctl", *(f"{NETWORK}.{10 + i} node{i}" for i in range(1, self.nodes + 1))]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *addresses, ""]))
        for i in range(self.gpus):  # Slurm wants to see a device's file; any will do
            os.mknod(self.folder / "dev" / f"nvidia{i}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        values = {"network": NETWORK, "folder": self.folder, "nodes": self.nodes, "gpus": self.gpus}
        (self.folder / "slurm.conf").write_text(_CONF.format(**values))
        devices = f"File={self.folder}/dev/nvidia[0-{self.gpus - 1}]"
        (self.folder / "gres.conf").write_text(f"NodeName=node[1-{self.nodes}] Name=gpu {devices}\n")

    def _entered(self, node: int) -> tuple[str, ...]:
        """Return what a command starts with to run on a node."""
        return ("nsenter", "-t", str(self._first_of(node)), "-n", "-u", "-i", "-m", "-p")

    def _first_of(self, node: int) -> int:
        """Return the first process of a node."""
        named = re.compile(rf"mini_slurm.py node \S+ {node}( |$)")
        [found] = [n for n in _below(self.process.pid) if named.search(_command(n)) and "unshare" not in _command(n)]
        return found


def missing() -> tuple[str, ...]:
    """Return what this machine lacks to be a cluster."""
    programs = tuple(
        name for name in NEEDED if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None
    )
    return programs if os.geteuid() == 0 else (*programs, "root")


def _children(number: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{number}/task/{number}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _below(number: int) -> list[int]:
    return [found for child in _children(number) for found in (child, *_below(child))]


def _command(number: int) -> str:
    try:
        return Path(f"/proc/{number}/cmdline").read_text().replace("\0", " ").strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _be_cluster(folder: Path, nodes: int, shared: Sequence[str]) -> None:
    """Be the first process of the cluster: network, munged, slurmctld and the nodes, which may be booted again."""
    os.mkfifo(folder / "boot")
    _do("mount", "--make-rprivate", "/")
    _do("mount", "--bind", str(folder / "hosts"), "/etc/hosts")
    _do("mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder / "small"))
    _do("hostname", "ctl")
    for command in ("set lo up", "add br0 type bridge", "set br0 up"):
        _do("ip", "link", *command.split())
    _do("ip", "address", "add", f"{NETWORK}.1/24", "dev", "br0")
    munge = folder / "munge"
    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
    _do("munged", "--force", *(f"--{flag}={munge / name}" for flag, name in files.items()))
    _do("slurmctld", "-c", "-i")
    for node in range(1, nodes + 1):
        _boot(folder, node, shared)
    (folder / "ready").touch()
    with os.fdopen(os.open(folder / "boot", os.O_RDWR)) as boot:  # for both, so that it never ends
        for line in boot:
            _boot(folder, int(line), shared)


def _boot(folder: Path, node: int, shared: Sequence[str]) -> None:
    linked = folder / "node" / f"node{node}" / "linked"
    linked.parent.mkdir(parents=True, exist_ok=True)
    linked.unlink(missing_ok=True)
    command = [*_UNSHARE, sys.executable, __file__, "node", str(folder), str(node), *shared]
    with (folder / "log" / f"node{node}.log").open("a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    own = os.readlink("/proc/self/ns/net")
    while not (inner := _children(process.pid)) or os.readlink(f"/proc/{inner[0]}/ns/net") == own:
        time.sleep(0.01)
    _do("ip", "link", "add", f"v{node}", "type", "veth", "peer", "name", "eth0", "netns", str(inner[0]))
    _do("ip", "link", "set", f"v{node}", "master", "br0", "up")
    linked.touch()


def _be_node(folder: Path, node: int, shared: Sequence[str]) -> None:
    """Be the first process of a node: its own address, shared memory and temporary folder, and slurmd."""
    _do("hostname", f"node{node}")
    place = folder / "node" / f"node{node}"
    while not (place / "linked").exists():
        time.sleep(0.01)
    _do("ip", "link", "set", "lo", "up")
    _do("ip", "address", "add", f"{NETWORK}.{10 + node}/24", "dev", "eth0")
    _do("ip", "link", "set", "eth0", "up")
    _do("mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", "/dev/shm")
    temporary = place / "tmp"
    temporary.mkdir(exist_ok=True)
    temporary.chmod(0o1777)
    for path in (folder, *map(Path, shared)):
        if path.is_relative_to("/tmp"):
            there = temporary / path.relative_to("/tmp")
            there.mkdir(parents=True, exist_ok=True)
            _do("mount", "--rbind", str(path), str(there))
    _do("mount", "--rbind", str(temporary), "/tmp")
    daemon = subprocess.Popen(["slurmd", "-D", "-N", f"node{node}"])
    while True:  # the first process of a process space inherits all orphans
        try:
            os.wait()
        except ChildProcessError:
            time.sleep(0.1)
        if daemon.poll() is not None:
            daemon = subprocess.Popen(["slurmd", "-D", "-N", f"node{node}"])


def _do(*command: str) -> None:
    subprocess.run(command, check=True)


if __name__ == "__main__":
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    be = {"cluster": _be_cluster, "node": _be_node}[sys.argv[1]]
    be(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
