"""Hosts of engines that come while a run goes on, to take the place of one that is lost."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from megarl.launchers.engine_hosts import EngineHost
from megarl.launchers.engine_processes import EngineLost
from megarl.launchers.host_address import HostsAddress
from megarl.launchers.host_calls import RemoteHost
from megarl.launchers.host_meeting import OTHER_PORT, Welcome, answered, greeted
from megarl.ranks.meeting import reserved


class LateHosts:
    """Listens where the run's hosts came to, until this process ends.

    One that comes proves that it knows the token and must fit, as those that came before the run. It is kept as long as
    it waits: nobody else has its place.
    """

    def __init__(self, address: HostsAddress, welcome: Welcome, tell: Callable[[str], None]) -> None:
        """Listen. tell: tells a person, in the thread that calls ``next``. Raises ResourceError for a taken port."""
        self._token, self._tell = address.token, tell
        # A late one that is lost as the ranks meet it is given up before the ranks are taken to hang.
        self._welcome, self._silence_s = replace(welcome, timeout_s=welcome.timeout_s / 2), welcome.timeout_s
        self._ready: queue.SimpleQueue[RemoteHost] = queue.SimpleQueue()
        self._refused: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._listener = reserved(address.host, address.port, OTHER_PORT)
        threading.Thread(target=self._listen, name="late hosts of engines", daemon=True).start()

    def next(self) -> RemoteHost | None:
        """Return one that is there and has imported what it needs, once; None without any. Doesn't wait."""
        while not self._refused.empty():
            self._tell(self._refused.get())
        while not self._ready.empty():
            if not (host := self._ready.get()).is_gone:
                self._tell(f"{host.name} has come for the engines of a host that is gone")
                return host
        return None

    def _listen(self) -> None:
        while True:
            line, peer = self._listener.accept()
            threading.Thread(target=self._receive, args=(line, peer[:2]), daemon=True).start()

    def _receive(self, line: socket.socket, peer: tuple[str, int]) -> None:
        host = greeted(line, peer, self._token)
        if host is None:
            return
        if wrong := answered([host], self._welcome):
            self._refused.put(f"{host.where} came for engines and is refused: {wrong}")
            return
        remote = RemoteHost(host.line, host.facts.name, self._silence_s)
        with suppress(EngineLost):
            remote.submit(EngineHost.meeting).result()
            self._ready.put(remote)
