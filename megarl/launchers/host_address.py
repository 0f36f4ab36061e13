"""MEGARL_ENGINE_HOSTS: where hosts of engines and the controller of a run meet, where Ray places neither.

Imports neither Ray nor torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from megarl.errors import Absent, ConfigError, Problem

ENGINE_HOSTS = "MEGARL_ENGINE_HOSTS"
TOKEN = "MEGARL_JOB_TOKEN"
"""The variable with the secret by which the nodes of a job know each other."""
NO_TOKEN = Problem(
    TOKEN,
    Absent(),
    "isn't set, and nodes know each other by it",
    f"export {TOKEN}=$(od -An -N16 -tx1 /dev/urandom | tr -d ' '), the same on all nodes",
)
START_S = "MEGARL_START_S"
"""The variable with the seconds for all nodes to be there."""
DEFAULT_START_S = 300.0
_LAST_PORT = 65_535


@dataclass(frozen=True)
class HostsAddress:
    """Where hosts of engines come to. host, port: the controller's. token: that all know. wait_s: for all to come."""

    host: str
    port: int
    token: str = field(repr=False)
    wait_s: float

    @property
    def place(self) -> str:
        """Host and port, as they are typed."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def command(self) -> str:
        """What is typed on the node of a host."""
        return f"{TOKEN}=... python -m megarl.engine_host {self.place}"


def named_hosts(environ: Mapping[str, str] = os.environ) -> HostsAddress | None:
    """Return where a run's hosts of engines come to, None where it has none. Raises ConfigError as ``hosts_at``."""
    text = environ.get(ENGINE_HOSTS, "")
    return hosts_at(text, ENGINE_HOSTS, environ) if text else None


def hosts_at(text: str, key: str, environ: Mapping[str, str] = os.environ) -> HostsAddress:
    """Return the HostsAddress that ``text`` names; it is the value of ``key``.

    Raises ConfigError where it is no host:port, without the token, and where the time to wait is no number.
    """
    problems, (host, _, port) = [], text.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or not 0 < int(port) <= _LAST_PORT:
        allowed = "must be host:port, a free port of the node that the run's controller is on"
        problems.append(Problem(key, text, allowed, "as in 10.0.0.1:29510"))
    if not environ.get(TOKEN):
        problems.append(NO_TOKEN)
    wait = environ.get(START_S, "") or str(DEFAULT_START_S)
    if not wait.replace(".", "", 1).isdecimal():
        problems.append(Problem(START_S, wait, "must be a number of seconds", f"{START_S}={DEFAULT_START_S:g}"))
    if problems:
        raise ConfigError(problems)
    return HostsAddress(host.strip("[]"), int(port), environ[TOKEN], float(wait))
