"""Calls of the controller to an EngineHost on another node, over a connection whose ends have proven who they are."""

from __future__ import annotations

import os
import socket
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from multiprocessing.connection import Connection
from typing import Any, TypeVar, TypeVarTuple

from megarl.errors import MegarlError, WorkerError
from megarl.launchers.engine_hosts import EngineHost
from megarl.launchers.engine_processes import EngineLost

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_BEAT_S = 5.0
_SILENCE_S = 60.0  # at least: a busy machine beats late
_START_S = 600.0  # at least, until the first beat: imports take long from a slow file system


@dataclass(frozen=True)
class Call:
    """What a host shall run. number: of its answer; None for one without, which runs after those before it."""

    number: int | None
    verb: Callable[..., Any]
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Answered:
    """The answer to the call of a number: what it returned, or raised."""

    number: int
    value: Any
    error: Exception | None


class RemoteHost:
    """A Host at the other end of a connection.

    name: of its node, for people. silence_s: after which it is taken for lost, at least a minute. One that is stopped
    says nothing, and keeps its connection.
    """

    def __init__(self, line: socket.socket, name: str, silence_s: float) -> None:
        self.name, self._line, self._connection = name, line, Connection(os.dup(line.fileno()))
        self._silence_s = max(silence_s, _SILENCE_S)
        self._waiting: dict[int, Future[Any]] = {}
        self._numbers, self._lock, self._writing = count(), threading.Lock(), threading.Lock()
        self._why = ""
        threading.Thread(target=self._hear, name=f"engine host on {name}", daemon=True).start()

    @property
    def is_gone(self) -> bool:
        """Whether it has ended, as far as is known here."""
        return bool(self._why)

    def submit(self, verb: Callable[[EngineHost, *Ts], T], *arguments: *Ts) -> Future[T]:
        """Have the host run ``verb`` beside all else that it is asked for."""
        future: Future[T] = Future()
        with self._lock:
            if self._why:
                future.set_exception(self._lost())
                return future
            number = next(self._numbers)
            self._waiting[number] = future
        self._send(Call(number, verb, arguments))
        return future

    def tell(self, verb: Callable[[EngineHost, *Ts], None], *arguments: *Ts) -> None:
        """Have the host run ``verb`` after all that it was told before; don't wait."""
        self._send(Call(None, verb, arguments))

    def end(self, why: str) -> None:
        """End the connection, with which the host and its engines end."""
        with self._lock:
            self._why = self._why or why
            waiting, self._waiting = self._waiting, {}
        with suppress(OSError):  # of one that has ended
            self._line.shutdown(socket.SHUT_RDWR)
        for future in waiting.values():
            future.set_exception(self._lost())

    def _send(self, call: Call) -> None:
        with self._writing:
            try:
                self._connection.send(call)
            except OSError as error:
                self.end(str(error))

    def _hear(self) -> None:
        """Take in answers until the connection ends."""
        why, limit_s = "what it says can't be read", max(self._silence_s, _START_S)
        try:
            while True:
                if not self._connection.poll(limit_s):
                    raise TimeoutError(f"nothing was heard of it for {limit_s:g} s (trainer.hang_timeout_s)")
                answered: Answered | None = self._connection.recv()
                limit_s = self._silence_s
                if answered is None:
                    continue
                with self._lock:
                    future = self._waiting.pop(answered.number, None)
                if future is None:  # it has been given up meanwhile
                    continue
                if answered.error is None:
                    future.set_result(answered.value)
                else:
                    future.set_exception(answered.error)
        except (EOFError, OSError) as error:
            why = str(error) or "it closed the connection"
        finally:
            self.end(why)

    def _lost(self) -> EngineLost:
        return EngineLost(f"the engine host on {self.name} is gone: {self._why}")


def serve_calls(line: socket.socket, host: EngineHost, num_at_once: int) -> None:
    """Run what the controller calls until its end, or that of the connection. Raises OSError where it is lost."""
    told, asked, writing = ThreadPoolExecutor(1), ThreadPoolExecutor(num_at_once), threading.Lock()
    connection, ended = Connection(os.dup(line.fileno())), threading.Event()

    def say(answered: Answered | None) -> None:
        with writing, suppress(OSError):  # ``recv`` below says so
            connection.send(answered)

    def answer(number: int, call: Call) -> None:
        say(_answered(number, host, call))

    def beat() -> None:
        while not ended.wait(_BEAT_S):
            say(None)

    def obey(call: Call) -> None:
        try:
            call.verb(host, *call.arguments)
        except BaseException:
            line.shutdown(socket.SHUT_RDWR)  # the engine would wait for it in vain
            traceback.print_exc()
            raise

    threading.Thread(target=beat, name="heartbeat", daemon=True).start()
    try:
        while True:
            call: Call = connection.recv()
            if call.number is None:
                told.submit(obey, call)
            else:
                asked.submit(answer, call.number, call)
    except (EOFError, ConnectionResetError):
        return
    finally:
        ended.set()


def _answered(number: int, host: EngineHost, call: Call) -> Answered:
    """Return the answer to a call."""
    try:
        return Answered(number, call.verb(host, *call.arguments), None)
    except (EngineLost, MegarlError) as error:
        return Answered(number, None, error)
    except Exception:  # noqa: BLE001 - the controller raises it
        where = f"{call.verb.__name__} failed on {socket.gethostname()}"
        return Answered(number, None, WorkerError(f"{where}:\n{traceback.format_exc().rstrip()}"))
