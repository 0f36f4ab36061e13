"""Saving and loading a role's state against the same bytes written and read raw, and what a background save costs.

    OMP_NUM_THREADS=1 python benchmarks/checkpoint.py [--ranks 2] [--repetitions 5] [--write]

starts the ranks of a Qwen3 of 34M parameters with Adam's moments (some 400 MB), which save, write raw, load and read
raw by turns; hashes are on, and all writes are synced. A step is an update of 64 rollouts of up to 160 tokens. --write
puts the table into docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from page import write_measured
from update import SIZES, make_batch

RESULT = "RESULT "
T = TypeVar("T")
_CHUNK = 1 << 22


def measure(folder: Path, repetitions: int) -> dict[str, list[float]]:
    """Return the seconds of each repetition on this rank, and bytes, by what was timed."""
    from megarl.ranks.join import join_ranks

    join_ranks()
    import torch.distributed as dist

    from megarl.checkpoint.manifest import FileRecord, read_manifest, verify, write_manifest
    from megarl.checkpoint.rank_save import RankSave
    from megarl.checkpoint.role_files import SavedRole
    from megarl.parallel.layout import Layout
    from megarl.train.actor import Actor
    from megarl.verify.roles import TRAINING, role_on
    from megarl.verify.work import PPO, backend_on_rank, update

    size = replace(SIZES["small"], rollouts=64)
    role = role_on(Layout(dist.get_world_size()), size.shape, training=TRAINING, micro_batch_size=8)
    backend, batch, loss = backend_on_rank(role), make_batch(size), replace(PPO, kl_coef=None)
    actor, rank, found = Actor(backend), dist.get_rank(), dict[str, list[float]]()
    update(actor, batch, loss)

    def timed(name: str, work: Callable[[], T]) -> T:
        dist.barrier()
        start = time.perf_counter()
        done = work()
        dist.barrier()
        found.setdefault(f"{name}_s", []).append(time.perf_counter() - start)
        return done

    def save(*, in_background: bool) -> RankSave:
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        name = "stall" if in_background else "save"
        return timed(name, lambda: RankSave(folder, {"actor": backend}, backend.device, in_background=in_background))

    def repeat() -> None:
        files = save(in_background=False).result().files
        num_bytes = sum(file.num_bytes for file in files)
        gathered: list[tuple[FileRecord, ...]] = [()] * dist.get_world_size()
        dist.all_gather_object(gathered, files)
        if rank == 0:
            write_manifest(folder, 1, [file for those in gathered for file in those])
        raw = folder.with_name(f"raw{rank}")
        timed("raw_write", lambda: _write_raw(raw, num_bytes))
        timed("verify", lambda: rank == 0 and verify(folder, read_manifest(folder)))
        timed("load", lambda: backend.load(SavedRole(folder, "actor"), backend.counts()))
        timed("raw_read", lambda: _read_raw(raw))
        timed("step", lambda: update(actor, batch, loss))
        writing = save(in_background=True)
        timed("step_meanwhile", lambda: update(actor, batch, loss))
        writing.result()
        found.setdefault("bytes", []).append(float(num_bytes))

    for _ in range(repetitions):
        repeat()
    return found


def _write_raw(path: Path, num_bytes: int) -> None:
    content = os.urandom(_CHUNK)
    with path.open("wb") as file:
        left = num_bytes
        while left:
            left -= file.write(content[:left])
        file.flush()
        os.fsync(file.fileno())


def _read_raw(path: Path) -> None:
    with path.open("rb") as file:
        while file.read(_CHUNK):
            pass


def run(num_ranks: int, repetitions: int) -> dict[str, list[float]]:
    """Start the ranks and return what rank 0 measured; bytes are of all ranks."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
        command += [__file__, "--in", folder, "--repetitions", str(repetitions)]
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith(RESULT))
    result: dict[str, list[float]] = json.loads(line.removeprefix(RESULT))
    return result


def table(found: dict[str, list[float]], num_ranks: int) -> str:
    """Return the part of docs/performance.md that is measured."""
    mib = statistics.median(found["bytes"]) * num_ranks / 2**20
    at = {name: statistics.median(times) for name, times in found.items()}
    step, meanwhile = at["step_s"], at["step_meanwhile_s"]
    return "\n".join(
        [
            f"`OMP_NUM_THREADS=1 python benchmarks/checkpoint.py --ranks {num_ranks}`, {mib:,.0f} MiB, medians of "
            f"{len(found['bytes'])}, all ranks together:",
            "",
            "| | MiB/s | raw, MiB/s | ratio |",
            "|---|---|---|---|",
            _row("save, with SHA-256 and fsync", mib, at["save_s"], at["raw_write_s"]),
            _row("load, from the page cache", mib, at["load_s"], at["raw_read_s"]),
            _row("verify", mib, at["verify_s"], at["raw_read_s"]),
            "",
            f"A save in the background stops training for {at['stall_s']:.2f} s, {at['stall_s'] / step:.1%} of a step "
            f"of {step:.1f} s; the step that it is written beside takes {meanwhile / step:.2f} x as long.",
        ]
    )


def _row(name: str, mib: float, seconds: float, raw_s: float) -> str:
    return f"| {name} | {mib / seconds:,.0f} | {mib / raw_s:,.0f} | {raw_s / seconds:.2f} |"


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--in", dest="folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.folder is not None:
        found = measure(given.folder / "checkpoint", given.repetitions)
        if os.environ["RANK"] == "0":
            print(RESULT + json.dumps(found), flush=True)
        return
    text = table(run(given.ranks, given.repetitions), given.ranks)
    print(text)
    if given.write:
        write_measured("checkpoint", text)


if __name__ == "__main__":
    main()
