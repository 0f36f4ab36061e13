"""What a node says of itself at the roll call, and what must be the same on all of them."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megarl.launchers.versions import other_versions, versions_here
from megarl.parallel.environment import platform_name

OTHER_PORTS = "MEGARL_PORT=PORT, the first of ten that are free on every node"
"""What is to be done where a port of the job is another program's."""
_DRIVER = Path("/proc/driver/nvidia/version")
_GPUS = Path("/proc/driver/nvidia/gpus")
_FABRIC = Path("/sys/class/infiniband")
_ROOM_BYTES = 1 << 20
_SEEN_S = 10.0  # a network file system may show a new file late


@dataclass(frozen=True)
class NodeFacts:
    """What a node says of itself.

    versions: of Python, of packages, and of megarl's source. fabric: active ports of InfiniBand and RoCE. num_devices:
    GPUs, None on CPU. files: by path, what lies there, the same on all nodes that see the same file system.
    sees_run_folder: whether a file that the first node wrote beside the run folder is there. own_folder: why the node
    can't use its own folder, empty where it can. taken_ports: of the job's, that another program listens on.
    """

    node_rank: int
    name: str
    address: str
    platform: str
    versions: Mapping[str, str]
    driver: str
    fabric: str
    num_devices: int | None
    files: Mapping[str, str]
    sees_run_folder: bool
    own_folder: str
    taken_ports: Sequence[int] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return the facts as plain values."""
        return asdict(self)


def read_facts(
    node_rank: int, address: str, paths: Iterable[Path], probe: Path, folder: Path, ports: Iterable[int] = ()
) -> NodeFacts:
    """Return the NodeFacts of this machine.

    paths: of data and models. probe: the file of the first node. folder: of this node alone, which is made. ports: that
    the job's programs will listen on.
    """
    platform = platform_name()
    return NodeFacts(
        node_rank=node_rank,
        name=socket.gethostname(),
        address=address,
        platform=platform,
        versions=versions_here(),
        driver=_driver(),
        fabric=active_ports(_FABRIC),
        num_devices=_num_gpus() if platform == "cuda" else None,
        files={str(path): _fingerprint(path) for path in paths},
        sees_run_folder=_appears(probe),
        own_folder=_refusal(folder),
        taken_ports=[port for port in ports if _is_taken(port)],
    )


def differences(
    nodes: Sequence[NodeFacts], devices: int, run_folder: Path, fix: str = "trainer.run_dir=FOLDER on one"
) -> Iterator[str]:
    """Yield a sentence for everything that keeps the nodes from being one machine.

    devices: wanted of each node. fix: how to name another run folder.
    """
    first = nodes[0]
    for node in nodes:
        if not node.sees_run_folder:
            yield (
                f"{node.name} doesn't see what {first.name} writes in {run_folder}: it must be on a file "
                f"system that all nodes see. fix: {fix}"
            )
        if node.own_folder:
            yield f"{node.own_folder} on {node.name}. fix: TMPDIR=FOLDER, where every node has room of its own for you"
        if node.taken_ports:
            taken = ", ".join(map(str, node.taken_ports))
            yield f"another program listens on {node.name} at what this job would: {taken}. fix: {OTHER_PORTS}"
        if node.num_devices is not None and node.num_devices < devices:
            yield f"{node.name} has {node.num_devices} GPUs, and {devices} are wanted of each node (MEGARL_DEVICES)"
        if node.platform != first.platform:
            yield f"{node.name} is a {node.platform} machine, {first.name} a {first.platform} machine"
        yield from other_versions(node.name, node.versions, first.name, first.versions)
        for path, found in node.files.items():
            if found != first.files.get(path):
                yield (
                    f"{path} isn't the same on {node.name} ({found}) as on {first.name} ({first.files.get(path)}). "
                    "fix: put it on a file system that all nodes see, or copy it to all of them"
                )


def report(nodes: Sequence[NodeFacts]) -> str:
    """Return a line on the nodes that are there, and one on drivers and fabrics that differ, which is allowed."""
    first = nodes[0]
    names = ", ".join(f"{node.name} ({node.address})" for node in nodes)
    told = ("Python", "torch", *(what for what in first.versions if "nccl" in what))
    parts = [first.platform, *(f"{what} {version}" for what, version in first.versions.items() if what in told)]
    parts += [f"driver {first.driver}"] if first.driver else []
    parts += [f"fabric {first.fabric}"] if first.fabric else []
    lines = [f"{len(nodes)} nodes: {names}; {', '.join(parts)}"]
    for kind, found in (("drivers", [n.driver for n in nodes]), ("fabrics", [n.fabric for n in nodes])):
        if len(set(found)) > 1:
            each = (f"{node.name} {value or 'none'}" for node, value in zip(nodes, found, strict=True))
            lines.append(f"{kind} differ: {', '.join(each)}")
    return "\n".join(lines)


def active_ports(folder: Path) -> str:
    """Return number, rate and kind of a machine's active ports, as in ``8 x 400 Gb/sec (4X NDR) InfiniBand``."""
    ports = [
        f"{(port / 'rate').read_text().strip()} {(port / 'link_layer').read_text().strip()}"
        for port in folder.glob("*/ports/*")
        if "ACTIVE" in (port / "state").read_text()
    ]
    return ", ".join(f"{number} x {kind}" for kind, number in sorted(Counter(ports).items()))


def _driver() -> str:
    found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", _DRIVER.read_text()) if _DRIVER.is_file() else None
    return found[0] if found else ""


def _num_gpus() -> int:
    return sum(1 for _ in _GPUS.iterdir()) if _GPUS.is_dir() else 0


def _fingerprint(path: Path) -> str:
    """Return a path's number and bytes of files and a hash of their names and sizes, in a few words; no content."""
    if path.is_file():
        return f"{path.stat().st_size} bytes"
    if not path.is_dir():
        return "not there"
    files = sorted((entry.name, entry.stat().st_size) for entry in path.iterdir() if entry.is_file())
    digest = hashlib.sha256(repr(files).encode()).hexdigest()[:6]
    return f"{len(files)} files, {sum(size for _, size in files)} bytes, {digest}"


def _refusal(folder: Path) -> str:
    """Make a folder that only the user may enter; return why it can't be used, empty where it can."""
    room = folder / "room"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.lstat().st_uid != os.getuid():
            return f"{folder} is another user's"
        room.write_bytes(bytes(_ROOM_BYTES))
        room.unlink()
    except OSError as error:
        return f"{folder} can't be written: {error.strerror}"
    return ""


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have closed are no matter
        try:
            probe.bind(("", port))
        except OSError:
            return True
    return False


def _appears(probe: Path) -> bool:
    deadline = time.monotonic() + _SEEN_S
    while not probe.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
