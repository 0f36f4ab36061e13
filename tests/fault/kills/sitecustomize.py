"""Kill one process of a run whose PYTHONPATH has this folder: Python imports a module of this name when it starts.

MEGARL_TEST_KILL is ``<rank>:<module>:<function>:<call>:<when>``, perhaps with ``:<victim>``: the process of that rank
(``-``: one that is no rank) is killed with SIGKILL ``before`` or ``after`` the n-th call of a function, or of a method
as in ``Optimizer.step``. victim: the name of another process of the run, as ``raylet``, which is killed instead.
The file MEGARL_TEST_STRUCK is there from then on, and processes that start later are spared.
"""

from __future__ import annotations

import functools
import itertools
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

_RUN = "MEGARL_TEST_RUN"  # a variable that all processes of a run have alike


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        rank, _, function, call, when, *victim = os.environ["MEGARL_TEST_KILL"].split(":")
        *owners, name = function.split(".")
        owner = functools.reduce(getattr, owners, module)
        setattr(owner, name, _deadly(getattr(owner, name), rank, int(call), when, "".join(victim)))


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != os.environ["MEGARL_TEST_KILL"].split(":")[1]:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        assert spec is not None and isinstance(spec.loader, SourceFileLoader)
        spec.loader = _Loader(fullname, spec.loader.path)
        return spec


def _deadly(function: Callable[..., Any], rank: str, call: int, when: str, victim: str) -> Callable[..., Any]:
    calls = itertools.count(1)

    @functools.wraps(function)
    def deadly(*args: Any, **kwargs: Any) -> Any:
        is_now = os.environ.get("RANK", "-") == rank and next(calls) == call
        if is_now and when == "before":
            _kill(victim)
        result = function(*args, **kwargs)
        if is_now and when == "after":
            _kill(victim)
        return result

    return deadly


def _kill(victim: str) -> None:
    pid = _pid_of(victim) if victim else os.getpid()
    Path(os.environ["MEGARL_TEST_STRUCK"]).touch()
    os.kill(pid, signal.SIGKILL)


def _pid_of(name: str) -> int:
    import psutil

    found = [process for process in psutil.process_iter() if process.name() == name]
    (pid,) = [process.pid for process in found if process.environ().get(_RUN) == os.environ[_RUN]]
    return int(pid)


if "MEGARL_TEST_KILL" in os.environ and not Path(os.environ["MEGARL_TEST_STRUCK"]).exists():
    sys.meta_path.insert(0, _Finder())
