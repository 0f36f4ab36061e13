"""The shared memory through which the ranks of a CPU replica of vLLM reduce their tensors.

Each rank creates one segment and maps those of its peers. vLLM gives every torchrun job on a machine the same names,
and leaves the segments behind when a rank is killed. Here the names carry the job's address, and are removed as soon as
all ranks have mapped them: the memory itself lives until its last rank ends, however that happens.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from megarl.errors import ResourceError

FOLDER = Path("/dev/shm")
BYTES_PER_THREAD = 4 * 2**20 + 2**16
"""Bytes of a rank's segment for each of its threads: a buffer of 4 MiB, and its state rounded up."""


def job_name() -> str:
    """Return the start of the names of this job's segments, which no other live job on the machine shares.

    MASTER_ADDR and MASTER_PORT serve: a live job holds its port, and a later one that gets it finds a dead job's names.
    """
    return re.sub(r"[^A-Za-z0-9.]", "_", f"megarl_{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}")


def remove_segments(job: str, ranks: Sequence[int], rank: int, folder: Path = FOLDER) -> list[Path]:
    """Remove the names of the segments that ``rank`` made as a member of the replica ``ranks``, and return them.

    A rank removes what it made itself, so that no barrier is needed: before it makes a segment (then a killed job left
    it) and after all peers have mapped it.
    """
    group = re.escape("-".join(map(str, ranks)))
    name = re.compile(rf"{re.escape(job)}-[a-z]+:\d+-\[{group}\]-cpushm_{list(ranks).index(rank)}")
    found = [path for path in folder.iterdir() if name.fullmatch(path.name)]
    for path in found:
        path.unlink(missing_ok=True)
    return found


def check_room(num_ranks: int, num_threads: int) -> None:
    """Raise ``ResourceError`` where the segments don't fit: the kernel would kill the ranks (SIGBUS) without a word.

    num_ranks: vLLM ranks on this machine. num_threads: OpenMP threads of each.
    """
    needed = num_ranks * num_threads * BYTES_PER_THREAD
    available = shutil.disk_usage(FOLDER).free
    if available < needed:
        raise ResourceError(
            f"{FOLDER} has {available / 2**20:.0f} MiB left, but {num_ranks} vLLM ranks of {num_threads} threads need "
            f"{needed / 2**20:.0f} MiB; remove files from it, lower OMP_NUM_THREADS, or enlarge it (docker: --shm-size)"
        )
