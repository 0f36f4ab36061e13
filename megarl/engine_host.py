"""The engines of a run on this node: ``MEGARL_JOB_TOKEN=... python -m megarl.engine_host HOST:PORT``.

For a run under torchrun or srun whose engines are on nodes of their own. HOST:PORT is what MEGARL_ENGINE_HOSTS is for
its rank 0, and the token the same. Start it once on every node of engines, before the run or after it.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys

from megarl.config.compose import errors_reported
from megarl.launchers.host_address import HostsAddress, hosts_at
from megarl.launchers.host_meeting import Welcome, come
from megarl.parallel.environment import check_platform, platform_name, visible_devices

INTERRUPTED = 130
# They are the controller's to act on, which may still have rollouts to wait for.
_OF_THE_RUN = (signal.SIGTERM, signal.SIGUSR1)


def main() -> None:
    """Meet the controller, and start its engines on this node until it ends."""
    parser = argparse.ArgumentParser(
        prog="python -m megarl.engine_host", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("place", metavar="HOST:PORT", help="where the run's controller waits for hosts of engines")
    asked = parser.parse_args()
    try:
        with errors_reported():
            code = _be_host(hosts_at(asked.place, "HOST:PORT"))
    except KeyboardInterrupt:
        print("interrupted: the engines on this node end", file=sys.stderr)
        code = INTERRUPTED
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a thread may still wait for weights


def _be_host(address: HostsAddress) -> int:
    """Return the exit code, once the run has ended."""
    check_platform()
    line, welcome = come(address)
    for number in _OF_THE_RUN:
        signal.signal(number, lambda number, frame: None)  # not SIG_IGN, which engines would inherit
    print(f"engines of the run at {address.place}, on {socket.gethostname()}", flush=True)
    try:
        _serve(line, welcome)
    except OSError as error:
        print(f"the run at {address.place} is lost: {error}; its engines on this node end", file=sys.stderr)
        return 1
    print(f"the run at {address.place} has ended", flush=True)
    return 0


def _serve(line: socket.socket, welcome: Welcome) -> None:
    """Have engines here until the controller ends. Raises OSError where it is lost."""
    os.environ.update(welcome.environ)  # before torch is imported
    from megarl.launchers.engine_hosts import EngineHost, HostPlace
    from megarl.launchers.host_calls import serve_calls

    devices = visible_devices() if platform_name() == "cuda" else None
    here, num_engines = HostPlace(line.getsockname()[0], devices), welcome.ranks_per_node // welcome.tp
    host = EngineHost({}, lambda: here, welcome.tp, welcome.timeout_s)
    try:
        serve_calls(line, host, 2 * num_engines + 2)
    finally:
        host.close()


if __name__ == "__main__":
    main()
