"""Reward functions by name. A row's ``data_source`` names its function unless the run names one for all rows."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Protocol, TypeVar

from megarl.errors import RewardError, nearest
from megarl.reward.math import (
    ends_with_marked_number,
    last_number,
    marked_number,
    score_exact_match,
    score_number,
    score_single_mark,
    why_no_number,
    why_no_single_mark,
)


class RewardFunction(Protocol):
    """What a reward function looks like. It is called with keywords, with the names that verl uses."""

    def __call__(
        self, *, data_source: str, solution_str: str, ground_truth: str, extra_info: Mapping[str, object]
    ) -> float | Mapping[str, float]:
        """Return the reward of a response: a finite number, or a mapping that has one under ``score``."""


_Function = TypeVar("_Function", bound=Callable[..., float | Mapping[str, float]])
_FUNCTIONS: dict[str, RewardFunction] = {}
_WHY_UNMATCHABLE: Mapping[str, Callable[[str], str]] = {
    "gsm8k": why_no_number,
    "openai/gsm8k": why_no_number,
    "gsm8k_flexible": why_no_number,
    "gsm8k_format": why_no_number,
    "counting": why_no_number,
    "verbs": why_no_single_mark,
}
DEFAULT_FUNCTION = "compute_score"


@dataclass(frozen=True)
class RewardSpec:
    """Which reward function to use.

    name: one for all rows; None: each row's data_source names it. path: a .py file of the user's with the function.
    kwargs: keyword arguments of every call, besides those of RewardFunction. components: names of the parts of a reward
    that the function has to return beside its ``score``.
    """

    name: str | None = None
    path: str | None = None
    function: str = DEFAULT_FUNCTION
    kwargs: Mapping[str, object] = field(default_factory=dict)
    components: tuple[str, ...] = ()


def register(*names: str) -> Callable[[_Function], _Function]:
    """Give a reward function its names. Raises RewardError if one is taken."""

    def add(function: _Function) -> _Function:
        for name in names:
            if name in _FUNCTIONS:
                raise RewardError(f"a reward function named {name!r} exists already. fix: choose another name")
            _FUNCTIONS[name] = function
        return function

    return add


@register("gsm8k", "openai/gsm8k")
def gsm8k(data_source: str, solution_str: str, ground_truth: str, extra_info: Mapping[str, object]) -> float:
    """Score the number right after the last ``####``."""
    return score_number(marked_number(solution_str), ground_truth)


@register("gsm8k_flexible")
def gsm8k_flexible(data_source: str, solution_str: str, ground_truth: str, extra_info: Mapping[str, object]) -> float:
    """Score the last number in the response, wherever it stands."""
    return score_number(last_number(solution_str), ground_truth)


@register("gsm8k_format")
def gsm8k_format(data_source: str, solution_str: str, ground_truth: str, extra_info: Mapping[str, object]) -> float:
    """Score 0.2 for a response that ends by itself with its one ``#### <number>``, and 1 where the number is right."""
    if extra_info.get("finish_reason") == "length" or not ends_with_marked_number(solution_str):
        return 0.0
    return max(0.2, score_number(marked_number(solution_str), ground_truth))


@register("exact_match")
def exact_match(data_source: str, solution_str: str, ground_truth: str, extra_info: Mapping[str, object]) -> float:
    """Score a response that has to be the ground truth itself."""
    return score_exact_match(solution_str, ground_truth)


@register("counting")
def counting(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Mapping[str, object]
) -> Mapping[str, float]:
    """Score the SmolLM2 task: ``form`` for a bare number and nothing else, ``right`` for the right one besides."""
    text, stopped = solution_str.strip(), extra_info["finish_reason"] == "stop"
    form = float(stopped and text.isdecimal())
    right = form * score_exact_match(text, ground_truth)
    return {"score": 0.2 * form + 0.8 * right, "form": form, "right": right}


@register("verbs")
def verbs(data_source: str, solution_str: str, ground_truth: str, extra_info: Mapping[str, object]) -> float:
    """Score the quickstart task. A response that was cut off is worth nothing: the model has to learn to stop."""
    stopped = extra_info["finish_reason"] == "stop"
    return score_single_mark(solution_str, ground_truth) if stopped else 0.0


def unmatchable(name: str, ground_truth: str) -> str:
    """Return why the registered function ``name`` gives no response its full reward, empty where one would have it."""
    why = _WHY_UNMATCHABLE.get(name)
    return why(ground_truth) if why else ""


def load_reward(
    name: str | None = None,
    path: str | None = None,
    function: str = DEFAULT_FUNCTION,
    kwargs: Mapping[str, object] | None = None,
) -> RewardFunction:
    """Return a reward function: the user's from a file, a registered one, or one that goes by each row's data_source.

    kwargs: of every call of the user's. Raises RewardError for an unknown name, a missing file or function, a file that
    fails, a function that can't be called as RewardFunction is, and for settings that contradict each other.
    """
    if path is None:
        if kwargs:
            raise RewardError(f"reward.kwargs = {dict(kwargs)!r} has no effect without reward.path. fix: set it")
        if function != DEFAULT_FUNCTION:
            raise RewardError(f"reward.function = {function!r} has no effect without reward.path. fix: set reward.path")
        return score_by_data_source if name is None else _by_name(name, "reward.name")
    if name is not None:
        raise RewardError(f"reward.name = {name!r} and reward.path = {path!r} are both set. fix: remove one")
    return _function_of(_load_module(path), path, function, dict(kwargs or {}))


def require_functions(data_sources: Iterable[str]) -> None:
    """Raise RewardError if a data_source has no reward function. For runs that name neither a reward nor a file."""
    for data_source in sorted(set(data_sources)):
        _by_name(data_source, "the data's data_source")


def score_by_data_source(
    *, data_source: str, solution_str: str, ground_truth: str, extra_info: Mapping[str, object]
) -> float | Mapping[str, float]:
    """Score with the function that the row's data_source names."""
    score = _by_name(data_source, "the row's data_source")
    return score(data_source=data_source, solution_str=solution_str, ground_truth=ground_truth, extra_info=extra_info)


def _by_name(name: str, key: str) -> RewardFunction:
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    own = "for your own function, set reward.path to its .py file; for a reward model, reward.model.path to its folder"
    hint = nearest(name, _FUNCTIONS) or own
    raise RewardError(f"{key} = {name!r}: no such reward function. allowed: {', '.join(sorted(_FUNCTIONS))}. {hint}")


def _load_module(path: str) -> ModuleType:
    file = Path(path).expanduser()
    if file.suffix != ".py" or not file.is_file():
        raise RewardError(f"reward.path = {path!r}: there is no such .py file. fix: correct the path")
    spec = importlib.util.spec_from_file_location(f"megarl_reward_file_{file.stem}", file)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look a class's module up by name
    folder = str(file.parent.resolve())
    if folder not in sys.path:
        sys.path.insert(0, folder)  # as for a script: the file may import those beside it
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        text = f"reward.path = {path!r}: the file failed: {type(error).__name__}: {error}"
        raise RewardError(f"{text}\n{_traceback_in(file, error)}".rstrip()) from error
    return module


def _traceback_in(file: Path, error: BaseException) -> str:
    """Return the traceback of an error from the user's file on, empty where it has no frame there (bad syntax)."""
    frame = error.__traceback__
    while frame is not None and frame.tb_frame.f_code.co_filename != str(file):
        frame = frame.tb_next
    return "".join(traceback.format_exception(type(error), error, frame)) if frame else ""


def _function_of(module: ModuleType, path: str, function: str, kwargs: Mapping[str, object]) -> RewardFunction:
    found = getattr(module, function, None)
    if not callable(found):
        known = [name for name, value in vars(module).items() if inspect.isfunction(value)]
        raise RewardError(
            f"reward.function = {function!r}: {path} has no such function. it has: {', '.join(known) or 'none'}. "
            f"{nearest(function, known)}"
        )
    if kind := _kind_without_a_number(found):
        raise RewardError(
            f"reward.function = {function!r}: it is {kind} in {path}, whose call gives no number. "
            "fix: a plain `def` that returns one; it may run an async function with asyncio.run"
        )
    row = {"data_source": "", "solution_str": "", "ground_truth": "", "extra_info": {}}
    if own := sorted(row.keys() & kwargs):
        raise RewardError(f"reward.kwargs names {', '.join(own)}, which every row gives. fix: another name")
    try:
        inspect.signature(found).bind(**row, **kwargs)
    except TypeError as error:
        more = f" and with reward.kwargs {', '.join(kwargs)}" if kwargs else ""
        raise RewardError(
            f"{function} in {path} can't be called with data_source, solution_str, ground_truth and extra_info{more}: "
            f"{error}"
        ) from error
    loaded: RewardFunction = functools.partial(found, **kwargs) if kwargs else found
    return loaded


def _kind_without_a_number(found: Callable[..., object]) -> str:
    """Return what a callable is whose call can't return a number, empty where it can."""
    if inspect.isclass(found):
        return "a class"
    # What functools.wraps has wrapped may well be async, and its wrapper plain: the wrapper alone is called.
    inner = found.func if isinstance(found, functools.partial) else found
    for called in (inner, inspect.getattr_static(type(inner), "__call__", None)):  # a function, or an object's own call
        if inspect.iscoroutinefunction(called):
            return "an async function"
        if inspect.isgeneratorfunction(called) or inspect.isasyncgenfunction(called):
            return "a generator function"
    return ""
