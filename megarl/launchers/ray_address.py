"""RAY_ADDRESS: which cluster it names, and whether anything answers there. Doesn't import Ray."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

from megarl.errors import ConfigError, Problem, ResourceError

RAY_ADDRESS = "RAY_ADDRESS"
_ANSWER_S = 5.0
_FIX = f"start the cluster (ray start --head), correct {RAY_ADDRESS}, or unset it: the run then starts a Ray of its own"


def named_cluster(environ: Mapping[str, str] = os.environ) -> str | None:
    """Return the address of the cluster that a run shall join, None where it starts a Ray of its own."""
    address = environ.get(RAY_ADDRESS, "")
    return None if address in ("", "local") else address


def check_ray_address(environ: Mapping[str, str] = os.environ) -> None:
    """Connect to the cluster that RAY_ADDRESS names, since Ray itself would try for minutes.

    Raises ConfigError where it is no host:port, and ResourceError where nothing answers.
    """
    address = named_cluster(environ)
    if address is None or address == "auto":
        return
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdigit() or "/" in host:
        raise ConfigError([Problem(RAY_ADDRESS, address, "must be host:port of the cluster's head, or auto", _FIX)])
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
    except (OSError, OverflowError) as error:
        raise unreachable(address, str(error)) from error


def unreachable(address: str, why: str) -> ResourceError:
    """Return the error of a cluster that can't be joined."""
    return ResourceError(f"no Ray cluster can be joined at {RAY_ADDRESS}={address}: {why}. fix: {_FIX}")
