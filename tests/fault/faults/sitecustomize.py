"""Break one rank of a run whose PYTHONPATH has this folder: Python imports a module of this name when it starts.

MEGARL_TEST_FAULT is ``<kind>:<rank>:<method>:<call>``: when that method of that rank's Worker is called for the n-th
time, the process is killed (kind ``kill``) or the method raises (kind ``raise``). The file MEGARL_TEST_STRUCK receives
the time of it.
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
            raise ArithmeticError("broken by the test")
        return method(*args)

    return maybe


if "MEGARL_TEST_FAULT" in os.environ:
    sys.meta_path.insert(0, _Finder())
