"""The worker's end of a worker process: it runs one reward function.

Over a socket it receives a RewardSpec and answers None once the function is loaded, or the text of an error. From
then on it receives lists of requests and answers each request by itself, so that the pool knows which one it works on.
"""

from __future__ import annotations

import faulthandler
import math
import os
import signal
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection
from numbers import Real

from megarl.errors import RewardError
from megarl.reward.registry import RewardFunction, load_reward
from megarl.types import RewardRequest, RewardResult

_PARENT_CHECK_S = 1.0
_MAX_DETAIL_CHARS = 1_000


def main(fd: int, parent: int, orphan_deadline_s: float) -> None:
    """Load the function and serve until the parent is done or gone; then end the whole process group.

    fd: of the socket. parent: process id of the pool. orphan_deadline_s: for one request if the pool is gone.
    """
    try:
        _serve(Connection(fd), parent, orphan_deadline_s)
    except (EOFError, OSError):
        pass  # the other end of the socket is closed: there is nobody left to tell
    finally:
        # A reward function may have started processes of its own. They are in the group that the pool made for us.
        os.killpg(os.getpgrp(), signal.SIGKILL)


def _serve(connection: Connection, parent: int, orphan_deadline_s: float) -> None:
    spec = connection.recv()
    try:
        function = load_reward(spec.name, spec.path, spec.function)
    except RewardError as error:
        connection.send(str(error))
        return
    connection.send(None)
    while True:
        # A process that the parent forked may hold the other end open, so the parent's end is not always an EOF.
        while not connection.poll(_PARENT_CHECK_S):
            if os.getppid() != parent:
                return
        for request in connection.recv():
            # While the pool lives, it kills a worker that is late. This is for a worker without a pool: no Python code
            # has to run for it, so it ends even a function that blocks signals or never gives up the interpreter.
            faulthandler.dump_traceback_later(orphan_deadline_s, exit=True)
            result = score_request(function, request)
            faulthandler.cancel_dump_traceback_later()
            connection.send(result)


def score_request(function: RewardFunction, request: RewardRequest) -> RewardResult:
    """Run the function on a request. Whatever it does becomes a result; the pool sets the score of a failed one."""
    try:
        value = function(
            data_source=request.data_source,
            solution_str=request.response,
            ground_truth=request.ground_truth,
            extra_info=request.extra_info,
        )
        return _checked(value)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - not swallowed: it becomes the result
        place = traceback.extract_tb(error.__traceback__, limit=-1)[0]
        return _failed("raised", f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})")


def _checked(value: object) -> RewardResult:
    score = value.get("score") if isinstance(value, Mapping) else value
    if not isinstance(score, Real):
        return _failed("invalid", f"the function returned {value!r}, not a number")
    if not math.isfinite(score):
        return _failed("invalid", f"the function returned {score!r}, not a finite number")
    return RewardResult(float(score), "ok")


def _failed(outcome: str, detail: str) -> RewardResult:
    return RewardResult(math.nan, outcome, detail[:_MAX_DETAIL_CHARS])
