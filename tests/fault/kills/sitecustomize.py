"""Kill one process of a run whose PYTHONPATH has this folder: Python imports a module of this name when it starts.

MEGARL_TEST_KILL is ``<rank>:<module>:<function>:<call>:<when>``: the process of that rank (``-``: one that is no rank)
is killed with SIGKILL ``before`` or ``after`` the n-th call of a function, or of a method as in ``Optimizer.step``. The
file MEGARL_TEST_STRUCK is there from then on, and processes that start later are spared.
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


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        rank, _, function, call, when = os.environ["MEGARL_TEST_KILL"].split(":")
        *owners, name = function.split(".")
        owner = functools.reduce(getattr, owners, module)
        setattr(owner, name, _deadly(getattr(owner, name), rank, int(call), when))


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


def _deadly(function: Callable[..., Any], rank: str, call: int, when: str) -> Callable[..., Any]:
    calls = itertools.count(1)

    @functools.wraps(function)
    def deadly(*args: Any, **kwargs: Any) -> Any:
        is_now = os.environ.get("RANK", "-") == rank and next(calls) == call
        if is_now and when == "before":
            _die()
        result = function(*args, **kwargs)
        if is_now:
            _die()
        return result

    return deadly


def _die() -> None:
    Path(os.environ["MEGARL_TEST_STRUCK"]).touch()
    os.kill(os.getpid(), signal.SIGKILL)


if "MEGARL_TEST_KILL" in os.environ and not Path(os.environ["MEGARL_TEST_STRUCK"]).exists():
    sys.meta_path.insert(0, _Finder())
