"""Apply the accommodations to each module of ``megatron.core`` as it is imported, however late that is."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType

from megarl.parallel.cpu.accommodations import NAMES, accommodate_import, accommodate_module, accommodate_torch

_PACKAGE = "megatron.core"


class _Loader(SourceFileLoader):
    """Load a module as Python does, then accommodate it."""

    def __init__(self, fullname: str, path: str, without: Collection[str]) -> None:
        super().__init__(fullname, path)
        self._without = without

    def exec_module(self, module: ModuleType) -> None:
        accommodate_import(self._without)
        super().exec_module(module)
        accommodate_module(module, self._without)


class _Finder(MetaPathFinder):
    """Find the modules of Megatron where Python would, and give them our loader."""

    def __init__(self, without: Collection[str]) -> None:
        self._without = without

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _PACKAGE and not fullname.startswith(f"{_PACKAGE}."):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(fullname, spec.loader.path, self._without)
        return spec


def accommodate_megatron(without: Collection[str]) -> None:
    """Install the hook, once a process. Raises RuntimeError if Megatron is already imported."""
    unknown = set(without) - NAMES
    if unknown:
        raise ValueError(f"no such accommodation: {sorted(unknown)}; there are {sorted(NAMES)}")
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    if _PACKAGE in sys.modules:
        raise RuntimeError(f"install_platform() must run before the first import of {_PACKAGE}")
    accommodate_torch(without)
    sys.meta_path.insert(0, _Finder(without))
