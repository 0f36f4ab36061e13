"""Break one rank of a run whose PYTHONPATH has this folder: Python imports a module of this name when it starts.

MEGARL_TEST_FAULT is ``<kind>:<rank>:<method>:<call>``: when that method of that rank's Worker is called for the n-th
time, the process is killed (kind ``kill``), the method raises (``raise``), or the command of the whole run, whose
process is MEGARL_TEST_COMMAND, is sent a signal, which the method waits for to arrive before it goes on: ``SIGTERM``,
``SIGUSR1``; ``twice`` sends two, ``hold`` one, and neither goes on; ``here`` sends SIGTERM to the rank alone. ``stop``
stops the process, ``skip`` leaves the method out, ``shape`` gives the next large sum over ranks another shape. The
file MEGARL_TEST_STRUCK receives the time of it.
"""

from __future__ import annotations

import functools
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

_MODULE = "megarl.ranks.worker"
_LARGE = 1000  # elements, which a sum of metrics or norms doesn't have
_ARRIVAL_S = 3.0  # more than what makes two signals one


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        kind, rank, method, call = os.environ["MEGARL_TEST_FAULT"].split(":")
        whole = getattr(module.Worker, method)
        setattr(module.Worker, method, _broken(whole, kind, rank, int(call)))


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _MODULE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        assert spec is not None and isinstance(spec.loader, SourceFileLoader)
        spec.loader = _Loader(fullname, spec.loader.path)
        return spec


def _broken(method: Callable[..., Any], kind: str, rank: str, call: int) -> Callable[..., Any]:
    calls = itertools.count(1)

    @functools.wraps(method)  # calls travel by the names of their functions
    def maybe(*args: Any) -> Any:
        if os.environ["RANK"] == rank and next(calls) == call:
            Path(os.environ["MEGARL_TEST_STRUCK"]).write_text(str(time.time()))
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "raise":
                raise ArithmeticError("broken by the test")
            if kind == "skip":
                return None
            if kind == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif kind == "shape":
                _misshape_the_next_sum()
            else:
                _send(kind)
        return method(*args)

    return maybe


def _misshape_the_next_sum() -> None:
    import torch
    import torch.distributed as dist

    whole = dist.all_reduce

    def misshapen(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.numel() < _LARGE:
            return whole(tensor, *args, **kwargs)
        dist.all_reduce = whole
        return whole(torch.cat([tensor.flatten(), tensor.flatten()]), *args, **kwargs)

    dist.all_reduce = misshapen


def _send(kind: str) -> None:
    command = os.getpid() if kind == "here" else int(os.environ["MEGARL_TEST_COMMAND"])
    name = kind if kind.startswith("SIG") else "SIGTERM"
    for _ in range(2 if kind == "twice" else 1):
        os.kill(command, signal.Signals[name])
        time.sleep(_ARRIVAL_S)
    if kind in ("twice", "hold"):
        time.sleep(3600)


if "MEGARL_TEST_FAULT" in os.environ:
    sys.meta_path.insert(0, _Finder())
