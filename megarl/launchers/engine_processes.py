"""The processes of an engine that isn't in the trainer's ranks, as the controller starts and ends them on its host."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Protocol

from megarl.errors import MegarlError, ResourceError
from megarl.launchers.host_address import ENGINE_HOSTS, TOKEN
from megarl.ranks.meeting import listening
from megarl.ranks.spec import EngineStart
from megarl.rollout.served import Answer, Failed, Order
from megarl.rollout.sglang import SglangSpec, sglang_environment

# What says that the controller is a rank, or what only it shall know.
_NOT_INHERITED = ("TORCHELASTIC_", "PET_", "RAY_", TOKEN, ENGINE_HOSTS)
_HOST = "127.0.0.1"
_LAST_WORDS_S = 1.0  # for ranks to say why they end, once one has
_POLL_S = 0.02
_NOTHING_TOLD: Mapping[int, str] = {}


class EngineLost(Exception):
    """An engine that can't go on: the text says why. A fresh one may take its place."""


class RunningEngine(Protocol):
    """One engine as the controller has it, wherever its processes are."""

    def send(self, order: Order) -> None:
        """Give the engine an order, after those before. Raises EngineLost where it is known to have died."""
        ...

    def receive(self, timeout_s: float) -> Answer | None:
        """Return the next answer, None where there is none in time.

        Raises EngineLost where a rank has died or failed, and the error of one that a user can act on.
        """
        ...

    def kill(self) -> None:
        """End all ranks."""
        ...


class EngineProcesses:
    """A RunningEngine on this host. Its ranks end where this process or one of them does, and with ``kill``."""

    def __init__(self, start: EngineStart, devices: Sequence[str] | None) -> None:
        """Start all ranks; the first answer says when they are ready. devices: names of theirs, None on CPU."""
        self.connections: list[Connection] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._temporary = tempfile.TemporaryDirectory(prefix="megarl_engine_")
        if isinstance(start.spec, SglangSpec):
            self._start_sglang(start.spec, devices)
        else:
            self._start_ranks(start.spec.tensor_parallel_size, devices)
        for connection in self.connections:
            with suppress(OSError):  # ``receive`` says of what it died
                connection.send(start)

    def send(self, order: Order) -> None:
        """Give the engine an order. Raises EngineLost where it has died."""
        try:
            self.connections[0].send(order)
        except OSError as error:
            raise self._lost() from error

    def receive(self, timeout_s: float) -> Answer | None:
        """Return the next answer, None where there is none in time.

        Raises EngineLost where a rank has died or failed, and the error of one that a user can act on.
        """
        for connection in wait(self.connections, timeout_s):
            assert isinstance(connection, Connection)
            try:
                answer: Answer = connection.recv()
            except (EOFError, OSError) as error:
                raise self._lost() from error
            if isinstance(answer, Failed):
                raise answer.error or self._lost({self.connections.index(connection): answer.text})
            if connection is self.connections[0]:
                return answer
        return None

    def kill(self) -> None:
        """End all ranks."""
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with what it started
        for process in self._processes:
            process.wait()
        for connection in self.connections:
            connection.close()
        self._temporary.cleanup()

    def _start_ranks(self, size: int, devices: Sequence[str] | None) -> None:
        """Start a process for each rank of a vLLM, of this interpreter."""
        with listening(_HOST) as listener:
            port = listener.getsockname()[1]
            for rank in range(size):
                environ = engine_environment(rank, size, port, None if devices is None else devices[rank])
                listener_fd = listener.fileno() if rank == 0 else None
                # Not multiprocessing: it would run the controller's main module again.
                code = f"import sys; sys.path[:] = {sys.path!r}; from megarl.ranks.engine_process import main; "
                call = f"main(int(sys.argv[1]), {listener_fd})"
                fds = [] if listener_fd is None else [listener_fd]
                self._start([sys.executable, "-u", "-c", code + call], environ, fds)

    def _start_sglang(self, spec: SglangSpec, devices: Sequence[str] | None) -> None:
        """Start the process of an SGLang, of an interpreter of its own, which starts its ranks itself."""
        with listening(_HOST) as listener:
            port, fd = listener.getsockname()[1], listener.fileno()
            environ = engine_environment(0, 1, port, None if devices is None else ",".join(devices))
            environ |= sglang_environment(spec.tensor_parallel_size)
            environ.pop("PYTHONPATH", None)  # another environment's packages
            program = ["-u", "-W", "ignore", "-m", "megarl.ranks.sglang_process", str(fd)]
            self._start([spec.python, *program], environ, [fd])

    def _start(self, command: Sequence[str], environ: Mapping[str, str], fds: Sequence[int]) -> None:
        ours, theirs = Pipe()
        with theirs:
            try:
                process = subprocess.Popen(
                    [*command, str(theirs.fileno())],
                    pass_fds=[theirs.fileno(), *fds],
                    stdin=subprocess.DEVNULL,
                    env={**environ, "TMPDIR": self._temporary.name},
                    start_new_session=True,  # Ctrl-C is the controller's to hear
                )
            except OSError as error:
                where = socket.gethostname()
                raise ResourceError(f"no engine can be started on {where}: {error}. fix: have it there too") from error
        self._processes.append(process)
        self.connections.append(ours)

    def _lost(self, told: Mapping[int, str] = _NOTHING_TOLD) -> EngineLost | MegarlError:
        """Return why the engine can't go on. told: what ranks said that failed, by rank."""
        deadline_s, said = time.monotonic() + _LAST_WORDS_S, dict(told)
        for rank, connection in enumerate(self.connections):
            with suppress(EOFError, OSError):
                while connection.poll(max(0.0, deadline_s - time.monotonic())):
                    if isinstance(answer := connection.recv(), Failed):
                        if answer.error is not None:
                            return answer.error
                        said.setdefault(rank, answer.text)
        while not any(codes := [process.poll() for process in self._processes]) and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)
        # A peer of one that was killed fails by itself, and one that failed exits: the first cause is said alone.
        for rank, code in enumerate(codes):
            if code is not None and code < 0:
                return EngineLost(f"rank {rank} died of signal {-code} ({signal.strsignal(-code)})")
        for rank, text in said.items():
            return EngineLost(f"rank {rank} failed:\n{text}")
        return EngineLost(f"a rank ended without a word (exit codes {codes})")


def engine_environment(
    rank: int, size: int, port: int, device: str | None, environ: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """Return the variables of a rank of an engine, whose ranks meet at ``port``. device: all that it sees."""
    inherited = {name: value for name, value in environ.items() if not name.startswith(_NOT_INHERITED)}
    return {
        **inherited,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank if device is None else 0),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": _HOST,
        "MASTER_PORT": str(port),
        **({} if device is None else {"CUDA_VISIBLE_DEVICES": device}),
    }
