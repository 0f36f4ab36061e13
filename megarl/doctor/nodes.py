"""The doctor on every node of an allocation of Slurm, and how fast nodes send to each other.

``python -m megarl.doctor --nodes`` starts this module under torchrun, one rank a node, and prints what comes of it.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megarl.doctor.examine import examine
from megarl.doctor.finding import Finding
from megarl.errors import ResourceError
from megarl.launchers.host_address import TOKEN
from megarl.nodes.programs import DOCTOR

_RESULT = "MEGARL_DOCTOR_RESULT"
_SENT_BYTES = 256 * 2**20
_SLOW_BYTES = 16 * 2**20  # over gloo, where nodes may be laptops
_FIRST_PORT, _NUM_JOBS = 20000, 1200


@dataclass(frozen=True)
class Transfer:
    """How fast one node sent to the next."""

    sender: str
    receiver: str
    gigabytes_per_s: float


@dataclass(frozen=True)
class NodesReport:
    """What all nodes found, by name, and the transfers between neighbours."""

    findings: Mapping[str, tuple[Finding, ...]]
    transfers: tuple[Transfer, ...]


def examine_nodes(environ: Mapping[str, str] = os.environ) -> NodesReport:
    """Return the report on the nodes of this allocation.

    Raises ResourceError outside of one, and where the nodes don't come together.
    """
    if "SLURM_JOB_NODELIST" not in environ:
        fix = "salloc --nodes=N, or start it in a batch script"
        raise ResourceError(f"--nodes looks at an allocation of Slurm, and this is none. fix: {fix}")
    listed = ["scontrol", "show", "hostnames", environ["SLURM_JOB_NODELIST"]]
    names = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split()
    job = environ["SLURM_JOB_ID"]
    # Where all nodes see it: the current folder, as in a run.
    with tempfile.TemporaryDirectory(prefix="megarl_doctor_", dir=Path.cwd()) as folder:
        result = Path(folder) / "result.json"
        spread = ["srun", f"--nodes={len(names)}", f"--ntasks={len(names)}", "--ntasks-per-node=1", "--overlap"]
        own = ["--devices=1", "--launcher=torchrun", f"--nodes={','.join(names)}", f"--job={job}_doctor"]
        port = _FIRST_PORT + int(job) % _NUM_JOBS * 10
        started = [sys.executable, "-m", "megarl.nodes", *own, f"--port={port}", f"--logs={folder}", "--wait-s=60"]
        more = {TOKEN: secrets.token_hex(16), _RESULT: str(result)}
        done = subprocess.run([*spread, *started, "--", DOCTOR], env={**environ, **more}, check=False)
        if not result.is_file():
            raise ResourceError(f"the nodes didn't come together (exit code {done.returncode}): see the lines above")
        return _report_of(json.loads(result.read_text(encoding="utf-8")))


def _report_of(values: Mapping[str, Any]) -> NodesReport:
    findings = {name: tuple(Finding(**found) for found in own) for name, own in values["findings"].items()}
    return NodesReport(findings, tuple(Transfer(**transfer) for transfer in values["transfers"]))


def report_text(report: NodesReport) -> str:
    """Return the report in lines: what all nodes found alike once, all else with the nodes' names."""
    nodes: dict[tuple[str, ...], list[str]] = {}
    first: dict[tuple[str, ...], Finding] = {}
    for name, findings in report.findings.items():
        for finding in findings:
            alike = (finding.level, finding.name, *(() if finding.level == "ok" else (finding.found, finding.fix)))
            nodes.setdefault(alike, []).append(name)
            first.setdefault(alike, finding)
    width = max(len(finding.name) for finding in first.values())
    lines = [f"{len(report.findings)} nodes: {', '.join(report.findings)}"]
    for alike, names in nodes.items():
        finding = first[alike]
        where = "" if set(names) == set(report.findings) else f"  [{', '.join(dict.fromkeys(names))}]"
        lines.append(f"{finding.level:<4}  {finding.name:<{width}}  {finding.found}{where}")
        if finding.fix:
            lines.append(f"      {'':<{width}}  fix: {finding.fix}")
    lines += [f"{t.sender} -> {t.receiver}: {t.gigabytes_per_s:.2f} GB/s" for t in report.transfers]
    return "\n".join(lines)


def main() -> None:
    """Be one node's rank: examine it, send to the next, and have the first write the result."""
    from megarl.ranks.join import join_ranks

    findings = [asdict(finding) for finding in examine()]
    platform = join_ranks()
    import torch.distributed as dist

    own = {"name": socket.gethostname(), "findings": findings}
    told: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(told, own)
    names = [str(node["name"]) for node in told]
    device = platform.device(int(os.environ["LOCAL_RANK"]))
    transfers = _transfers(names, device, _SENT_BYTES if platform.name == "cuda" else _SLOW_BYTES)
    if dist.get_rank() == 0:
        values = {
            "findings": {node["name"]: node["findings"] for node in told},
            "transfers": [asdict(transfer) for transfer in transfers],
        }
        Path(os.environ[_RESULT]).write_text(json.dumps(values), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def _transfers(names: Sequence[str], device: Any, num_bytes: int) -> list[Transfer]:
    """Return the transfers from each node to the next, one at a time. Collective."""
    import torch
    import torch.distributed as dist

    rank, found = dist.get_rank(), []
    buffer = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    for sender in range(len(names) - 1):
        seconds = torch.zeros(1, device=device)
        for _ in range(2):  # the first opens the connection
            dist.barrier()
            before = time.perf_counter()
            if rank == sender:
                dist.send(buffer, sender + 1)
            elif rank == sender + 1:
                dist.recv(buffer, sender)
                seconds[0] = float(buffer[-1]) + time.perf_counter() - before  # reading it waits for the device
        dist.broadcast(seconds, sender + 1)
        found.append(Transfer(names[sender], names[sender + 1], num_bytes / float(seconds) / 1e9))
    return found


if __name__ == "__main__":
    main()
