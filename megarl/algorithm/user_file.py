"""Advantage estimators and policy losses of the user's, from a python file that registers them."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from megarl.algorithm.advantage import estimators
from megarl.algorithm.policy_loss import policy_losses
from megarl.algorithm.registry import Registry
from megarl.errors import AlgorithmError, ConfigError, MegarlError, Problem

KEY = "algorithm.path"
_REGISTRIES: tuple[Registry[Any], ...] = (estimators, policy_losses)
_loaded: set[Path] = set()


def load_user_file(path: str) -> None:
    """Run the file at ``path``, which enters its functions into the registries. Once in a process.

    Raises ConfigError, with the line, where the file is missing, fails or takes a name of megarl's. It then leaves
    nothing registered.
    """
    file = Path(path).expanduser().resolve()
    if file in _loaded:  # under torchrun the controller is a rank too
        return
    if file.suffix != ".py" or not file.is_file():
        raise ConfigError([Problem(KEY, path, "there is no such .py file on this machine", "correct the path")])
    before = [(registry, registry.names()) for registry in _REGISTRIES]
    try:
        _run(file)
    except (Exception, SystemExit) as error:
        for registry, names in before:
            registry.forget(set(registry.names()) - set(names))
        place = f"{file.name}, line {_line(error, {file})[1]}"
        if isinstance(error, ConfigError):
            raise ConfigError([replace(p, allowed=f"{p.allowed} ({place})") for p in error.problems]) from error
        raise ConfigError([Problem(KEY, path, f"{place}: {type(error).__name__}: {error}")]) from error
    _loaded.add(file)


@contextmanager
def user_errors_named(key: str, name: str) -> Iterator[None]:
    """Raise AlgorithmError with file and line for what the function that ``key`` selects raises in the user's file."""
    try:
        yield
    except MegarlError:
        raise
    except Exception as error:
        file, line = _line(error, _loaded)
        if file is None:
            raise
        raise AlgorithmError(
            f"{key} = {name!r} failed at {file}, line {line}: {type(error).__name__}: {error}"
        ) from error


def _run(file: Path) -> None:
    spec = importlib.util.spec_from_file_location(f"megarl_algorithm_file_{file.stem}", file)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look a class's module up by name
    spec.loader.exec_module(module)


def _line(error: BaseException, files: set[Path]) -> tuple[Path | None, int | None]:
    """Return the place in one of ``files`` where an error arose, or was on its way through last; None if in none."""
    frames = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        frames.append((Path(error.filename), error.lineno))
    inside = [frame for frame in frames if frame[0] in files]
    return inside[-1] if inside else (None, None)
