"""Programs in forks of a process that has imported what they import, which takes longer than most of them do.

A program finds the imports of its kind done, and all else as if it had been started: arguments, environment, folder,
``__main__``, what runs at exit. Whatever tests how a program starts, loads or is ended, starts it by ``tests.launch``.

    python -m tests.forked KIND    serves requests, a line of JSON each, until its stdin ends
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from tests.launch import MARKER, end_of

ROOT = Path(__file__).parents[1]
_POLL_S = 0.02
_LEAVE_S = 30.0  # for the other ranks to end by themselves after one has failed

Kind = Literal["plan", "run"]
_IMPORTS: dict[Kind, tuple[str, ...]] = {
    "plan": ("tests.conftest", "huggingface_hub._snapshot_download", "megarl.plan.__main__"),
    "run": (
        "megarl.checks.run",
        "megarl.controller.open",
        "megarl.controller.loop",
        "megarl.controller.inputs",
        "megarl.ranks.worker",
        "megarl.rollout.vllm_cpu",
        "vllm.entrypoints.llm",
        "vllm.model_executor.models.qwen3",
        "vllm.model_executor.models.qwen3_moe",
        "vllm.v1.worker.cpu_model_runner",
        "vllm.v1.engine.llm_engine",
    ),
}


@dataclass(frozen=True)
class Request:
    """Run Python on ``arguments`` in ``folder``, once for each of ``environs``; output is added to two files."""

    arguments: tuple[str, ...]
    folder: str
    environs: tuple[dict[str, str], ...]
    stdout: str
    stderr: str
    timeout_s: float


@dataclass(frozen=True)
class Ended:
    """A program that has ended: the first exit code that isn't 0, if any is, and what was printed.

    processes: command lines of what it had started and was still running.
    """

    code: int
    stdout: str
    stderr: str
    processes: tuple[str, ...]

    @property
    def output(self) -> str:
        """What a person sees, errors last."""
        return f"{self.stdout}\n{self.stderr}"


def run_forked(
    kind: Kind,
    arguments: Sequence[str],
    folder: Path,
    *,
    num_ranks: int | None = None,
    environ: Mapping[str, str] | None = None,
    timeout_s: float = 300.0,
) -> Ended:
    """Run Python on ``arguments``, which are ``-m MODULE ...``, in ``folder``.

    num_ranks: starts one process a rank, as srun does. environ: added to this process's.
    """
    marker = uuid.uuid4().hex
    environment = {**os.environ, "MEGARL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1", **(environ or {}), MARKER: marker}
    environs = [environment] if num_ranks is None else [environment | world for world in _world(num_ranks)]
    with tempfile.TemporaryDirectory() as scratch:
        logs = Path(scratch, "stdout"), Path(scratch, "stderr")
        for log in logs:
            log.touch()
        codes = _answer(kind, Request(tuple(arguments), str(folder), tuple(environs), *map(str, logs), timeout_s))
        code = next((code for code in codes if code), 0)
        return Ended(code, logs[0].read_text(), logs[1].read_text(), end_of(marker))


def _answer(kind: Kind, request: Request) -> list[int]:
    server = _server(kind)
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps(asdict(request)) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    assert answer, "the process that programs are forked from has died"
    codes: list[int] = json.loads(answer)
    return codes


def _world(num_ranks: int) -> list[dict[str, str]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world |= {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
    return [world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]


@functools.cache
def _server(kind: Kind) -> subprocess.Popen[str]:
    environ = {**os.environ, "MEGARL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.forked", kind],
        cwd=ROOT,
        env=environ,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def serve(kind: Kind) -> Request | None:
    """Answer requests; return, in each fork, the request that it is to serve, and None at the end of them all."""
    _import(kind)
    for line in sys.stdin:
        request = Request(**json.loads(line))
        children = []
        for environ in request.environs:
            child = os.fork()
            if child == 0:
                _become(request, environ)
                return request
            children.append(child)
        print(json.dumps(_codes(children, request.timeout_s)), flush=True)
    return None


def _import(kind: Kind) -> None:
    if kind == "run":
        from megarl.parallel.environment import apply_environment

        apply_environment()
        from megarl.parallel.platform import install_platform

        install_platform()
    gc.disable()
    for name in _IMPORTS[kind]:
        importlib.import_module(name)
    for name in _IMPORTS[kind]:
        if name.endswith(".__main__"):
            del sys.modules[name]  # is to run
    if kind == "plan":  # what tests.conftest has read is read
        from megarl.config.command_line import parse_command_line
        from megarl.config.compose import compose
        from megarl.config.defaults import default_values

        for name in ("ppo_megatron_trainer", "ppo_trainer", "sft_trainer"):
            compose(parse_command_line([], name))
            default_values(name)
    gc.freeze()
    gc.enable()


def _become(request: Request, environ: Mapping[str, str]) -> None:
    """Make this fork look as if it had been started for ``request``."""
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(request.folder)
    for number, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, request.stdout, os.O_WRONLY | os.O_APPEND),
        (2, request.stderr, os.O_WRONLY | os.O_APPEND),
    ):
        opened = os.open(path, flags)
        os.dup2(opened, number)
        os.close(opened)


def _codes(children: Sequence[int], timeout_s: float) -> list[int]:
    """Return the exit codes of children; kill those that don't end in time, or soon after one that has failed."""
    codes: dict[int, int] = {}
    deadline_s = time.monotonic() + timeout_s
    while waiting := [child for child in children if child not in codes]:
        is_late = time.monotonic() > deadline_s
        for child in waiting:
            if is_late:
                os.kill(child, 9)
            ended, status = os.waitpid(child, 0 if is_late else os.WNOHANG)
            if ended:
                codes[child] = os.waitstatus_to_exitcode(status)
                if codes[child]:
                    deadline_s = min(deadline_s, time.monotonic() + _LEAVE_S)
        time.sleep(_POLL_S)
    return [codes[child] for child in children]


def main() -> None:
    """Serve requests, and in a fork do what it was forked for, as the last thing before the interpreter ends."""
    kind: Kind = "plan" if sys.argv[1] == "plan" else "run"
    request = serve(kind)
    if request is None:
        return
    sys.path.insert(0, request.folder)
    _, module, *sys.argv[1:] = request.arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
