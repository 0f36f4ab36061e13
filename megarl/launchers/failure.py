"""What a failure on a rank is called: with its rank, the call and the traceback."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from megarl.errors import MegarlError, WorkerError


@contextmanager
def failures_named(call: str) -> Iterator[None]:
    """Raise WorkerError, with all that a person needs to know, for an error that isn't a MegarlError."""
    try:
        yield
    except MegarlError:
        raise
    except Exception as error:
        text = f"rank {os.environ['RANK']} failed in {call}:\n{traceback.format_exc().rstrip()}"
        raise WorkerError(text) from error
