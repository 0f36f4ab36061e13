"""Runs a function on a fresh world of ranks, a process each: ``python -m megarl.gpu_check.ranks FOLDER``.

A process a function: Megatron decides while it is imported whether there is a Transformer Engine, and a process that
has used CUDA gives its memory back only when it ends.
"""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from megarl.errors import WorkerError

T = TypeVar("T")

_WITHOUT_TE = "--without-transformer-engine"
_POLL_S = 0.2


def on_ranks(
    folder: Path,
    function: Callable[..., T],
    *args: object,
    num_ranks: int = 1,
    te: bool = True,
    timeout_s: float = 900.0,
) -> list[T]:
    """Return ``function(*args)`` of each rank. te: whether Megatron may find Transformer Engine.

    function: a module-level function; it, the arguments and the results must pickle. Raises WorkerError with the end of
    what a rank said where one fails, or none is done after ``timeout_s``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "call").write_bytes(pickle.dumps((function, args)))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_ranks)}
    world["LOCAL_WORLD_SIZE"] = str(num_ranks)
    command = [sys.executable, "-m", "megarl.gpu_check.ranks", str(folder), *([] if te else [_WITHOUT_TE])]
    processes = []
    for rank in range(num_ranks):
        with (folder / f"said{rank}").open("wb") as said:
            environ = os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(command, env=environ, stdout=said, stderr=subprocess.STDOUT))
    try:
        _wait(processes, time.monotonic() + timeout_s)
        for rank, process in enumerate(processes):
            if process.returncode != 0:
                said_at_last = (folder / f"said{rank}").read_text(encoding="utf-8", errors="replace")[-3000:]
                raise WorkerError(
                    f"rank {rank} of {function.__name__} ended with {process.returncode}:\n{said_at_last}"
                )
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [pickle.loads((folder / f"result{rank}").read_bytes()) for rank in range(num_ranks)]


def _wait(processes: list[subprocess.Popen[bytes]], deadline_s: float) -> None:
    """Return once all have ended, one has failed, or time is over: those that run on are to be ended."""
    while any(process.poll() is None for process in processes):
        if any(process.returncode for process in processes) or time.monotonic() > deadline_s:
            return
        time.sleep(_POLL_S)


def main(folder: Path, *options: str) -> None:
    """Run the pickled call as the rank that the environment says, and pickle what it returns."""
    if _WITHOUT_TE in options:
        # An entry of None makes every import of it an ImportError, which is how Megatron finds out.
        sys.modules["transformer_engine"] = None  # type: ignore[assignment]
    from megarl.ranks.join import join_ranks

    join_ranks()
    function, args = pickle.loads((folder / "call").read_bytes())
    result = function(*args)
    (folder / f"result{os.environ['RANK']}").write_bytes(pickle.dumps(result))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
