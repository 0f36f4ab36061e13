"""A world of one rank on the machine's first GPU, in a process of its own: run a function there, hand back its result.

A GPU test asks for one each time: Megatron decides while it is imported whether there is a Transformer Engine, and a
process that has used CUDA gives its memory back only when it ends.
"""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

REPOSITORY = Path(__file__).parents[2]
WITHOUT_TE = "without-transformer-engine"


def run_alone(folder: Path, function: Callable[..., T], *args: object, te: bool = True, timeout_s: float = 600.0) -> T:
    """Return ``function(*args)`` of a rank alone in its world; te: whether Megatron may find Transformer Engine.

    function: a module-level function; it, the arguments and the result must pickle, and hold nothing on the GPU.
    """
    call, result = folder / "call.pickle", folder / "result.pickle"
    call.write_bytes(pickle.dumps((function, args)))
    command = [sys.executable, "-m", "tests.gpu.gpu_process", str(call), str(result), *([] if te else [WITHOUT_TE])]
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    answer: T = pickle.loads(result.read_bytes())
    return answer


def main(call: Path, result: Path, *options: str) -> None:
    """Run the pickled call and pickle what it returns."""
    if WITHOUT_TE in options:
        # An entry of None makes every import of it an ImportError, which is how Megatron finds out.
        sys.modules["transformer_engine"] = None  # type: ignore[assignment]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(world)
    from megarl.ranks.join import join_ranks

    join_ranks()
    function, args = pickle.loads(call.read_bytes())
    result.write_bytes(pickle.dumps(function(*args)))
    from megarl.parallel.world import leave_world

    leave_world()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
