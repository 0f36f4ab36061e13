"""vLLM without the queue between the ranks of a replica, through which one of them would tell the others what to do.

Here every rank schedules for itself. Unused, the queue would take 24 MiB of /dev/shm a replica, and leave them and a
socket a rank behind where a process is killed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_queue() -> Iterator[None]:
    """Have vLLM build its groups without a queue; what little they tell each other at the start goes over gloo."""
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

    own = MessageQueue.create_from_process_group
    MessageQueue.create_from_process_group = staticmethod(_no_queue)
    try:
        yield
    finally:
        MessageQueue.create_from_process_group = own


def _no_queue(*_group: object, **_settings: object) -> None:
    """Return no queue, whatever it would be for."""
