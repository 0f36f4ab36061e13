"""The worker's end of a worker process: it runs one reward function.

Over a socket it receives a RewardSpec and answers None once the function is loaded, or the text of an error. From
then on it receives lists of requests and answers each request by itself, so that the pool knows which one it works on.
"""

from __future__ import annotations

import faulthandler
import math
import os
import struct
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from numbers import Real
from types import TracebackType

from megarl.errors import RewardError
from megarl.reward.registry import RewardFunction, load_reward
from megarl.reward.started import MARK, end_started
from megarl.types import RewardRequest, RewardResult

# Exit statuses of a worker that ends by itself; process.py says them in words.
POOL_GONE, CONNECTION_LOST, OWN_FAILURE = 0, 71, 70
_PARENT_CHECK_S = 1.0
_MAX_DETAIL_CHARS, _MAX_TRACEBACK_CHARS, _MAX_FRAMES = 1_000, 6_000, 20


def main(fd: int, parent: int, orphan_deadline_s: float) -> None:
    """Load the function and serve until the parent is done or gone; then end what the function started, and exit.

    fd: of the socket. parent: process id of the pool. orphan_deadline_s: for one request if the pool is gone.
    """
    status = OWN_FAILURE
    try:
        status = _serve(Connection(fd), parent, orphan_deadline_s)
    except BaseException:  # noqa: BLE001 - the process ends here, with a status that the pool says in words
        traceback.print_exc()
    finally:
        # Its own group is spared: the pool would take the signal for something that the function did.
        end_started({os.environ[MARK]}, {os.getpgrp()}, spared=os.getpid())
        os._exit(status)


def _serve(connection: Connection, parent: int, orphan_deadline_s: float) -> int:
    """Return the exit status once the parent is done or gone."""
    try:
        spec = connection.recv()
        try:
            function = load_reward(spec.name, spec.path, spec.function, spec.kwargs)
        except RewardError as error:
            connection.send(str(error))
            return POOL_GONE
        connection.send(None)
        while True:
            # A process that the parent forked may hold the other end open, so the parent's end is not always an EOF.
            while not connection.poll(_PARENT_CHECK_S):
                if os.getppid() != parent:
                    return POOL_GONE
            for request in connection.recv():
                # While the pool lives, it kills a worker that is late. This is for a worker without a pool: no Python
                # code has to run for it, so it ends even a function that blocks signals or keeps the interpreter.
                faulthandler.dump_traceback_later(orphan_deadline_s, exit=True)
                result = score_request(function, request, spec.components)
                faulthandler.cancel_dump_traceback_later()
                connection.send(result)
    except (EOFError, OSError):
        return CONNECTION_LOST


def score_request(function: RewardFunction, request: RewardRequest, components: Sequence[str] = ()) -> RewardResult:
    """Run the function on a request. Whatever it does becomes a result; the pool sets the score of a failed one.

    components: names of the parts of the reward that it has to return beside its score.
    """
    try:
        value = function(
            data_source=request.data_source,
            solution_str=request.response,
            ground_truth=request.ground_truth,
            extra_info=request.extra_info,
        )
        return _checked(value, components)
    except BaseException as error:  # noqa: BLE001 - not swallowed: it becomes the result
        place = traceback.extract_tb(error.__traceback__, limit=-1)[0]
        where = f"{place.filename}:{place.lineno}"
        said = "".join(traceback.format_exception_only(error)).strip()[:_MAX_DETAIL_CHARS]
        kind = f"{type(error).__qualname__} at {where}"
        return RewardResult(math.nan, "raised", f"{said} ({where})"[:_MAX_DETAIL_CHARS], kind, traceback_of(error))


def traceback_of(error: BaseException) -> str:
    """Return the traceback of an error from the first call below the one that caught it, its middle cut if long."""
    below: TracebackType | None = error.__traceback__ and error.__traceback__.tb_next
    lines = traceback.format_exception(type(error), error, below or error.__traceback__, limit=-_MAX_FRAMES)
    text = "".join(lines).rstrip()
    half = _MAX_TRACEBACK_CHARS // 2
    return text if len(text) <= _MAX_TRACEBACK_CHARS else f"{text[:half]}\n  ...\n{text[-half:]}"


def _checked(value: object, components: Sequence[str]) -> RewardResult:
    """Return the result of a call that returned ``value``: a number, or a mapping with a number by each name."""
    given = value if isinstance(value, Mapping) else {"score": value}
    kind, numbers = f"returned {type(value).__qualname__}", []
    for name in ("score", *components):
        number = given.get(name)
        if not isinstance(number, Real):
            part = f"no number as its {name!r}, which algorithm.gdpo_reward_keys names"
            said = f"the function returned {_shown(value)}, {'not a number' if name == 'score' else part}"
            return RewardResult(math.nan, "invalid", said, kind)
        if not _is_finite(number):
            said = f"the function returned {_shown(number)}, not a finite number in float32"
            return RewardResult(math.nan, "invalid", said, kind)
        numbers.append(float(number))
    return RewardResult(numbers[0], "ok", components=tuple(numbers[1:]))


def _is_finite(number: Real) -> bool:
    """Whether a number is finite as the trainer computes with it: a larger one would be an infinity there."""
    try:
        return math.isfinite(struct.unpack("f", struct.pack("f", number))[0])
    except (OverflowError, struct.error):  # the second of an integer beyond any float
        return False


def _shown(value: object) -> str:
    """Return a value as Python writes it, its type where it can't."""
    try:
        return repr(value)[:_MAX_DETAIL_CHARS]
    except Exception:  # noqa: BLE001 - the value is invalid already, and is said to be
        return f"a {type(value).__qualname__}"
