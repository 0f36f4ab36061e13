"""Reward functions by name. A row's ``data_source`` names its function unless the run names one for all rows."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Protocol, TypeVar

from megarl.errors import RewardError, nearest
from megarl.reward.math import last_number, marked_number, score_exact_match, score_number, score_single_mark


class RewardFunction(Protocol):
    """What a reward function looks like. It is called with keywords, with the names that verl uses."""

    def __call__(
        self, *, data_source: str, solution_str: str, ground_truth: str, extra_info: Mapping[str, object]
    ) -> float:
        """Return the reward of a response: a finite number, or a mapping that has one under ``score``."""


_Function = TypeVar("_Function", bound=Callable[..., float])
_FUNCTIONS: dict[str, RewardFunction] = {}
DEFAULT_FUNCTION = "compute_score"


@dataclass(frozen=True)
class RewardSpec:
    """Which reward function to use.

    name: one for all rows; None: each row's data_source names it. path: a .py file of the user's with the function.
    """

    name: str | None = None
    path: str | None = None
    function: str = DEFAULT_FUNCTION


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


@register("exact_match")
def exact_match(data_source: str, solution_str: str, ground_truth: str, extra_info: Mapping[str, object]) -> float:
    """Score a response that has to be the ground truth itself."""
    return score_exact_match(solution_str, ground_truth)


@register("verbs")
def verbs(data_source: str, solution_str: str, ground_truth: str, extra_info: Mapping[str, object]) -> float:
    """Score the quickstart task. A response that was cut off is worth nothing: the model has to learn to stop."""
    stopped = extra_info["finish_reason"] == "stop"
    return score_single_mark(solution_str, ground_truth) if stopped else 0.0


def load_reward(name: str | None = None, path: str | None = None, function: str = DEFAULT_FUNCTION) -> RewardFunction:
    """Return a reward function: the user's from a file, a registered one, or one that goes by each row's data_source.

    Raises RewardError for an unknown name, a missing file or function, a file that fails, a function that can't be
    called as RewardFunction is, and for settings that contradict each other.
    """
    if path is None:
        if function != DEFAULT_FUNCTION:
            raise RewardError(f"reward.function = {function!r} has no effect without reward.path. fix: set reward.path")
        return score_by_data_source if name is None else _by_name(name, "reward.name")
    if name is not None:
        raise RewardError(f"reward.name = {name!r} and reward.path = {path!r} are both set. fix: remove one")
    return _function_of(_load_module(path), path, function)


def require_functions(data_sources: Iterable[str]) -> None:
    """Raise RewardError if a data_source has no reward function. For runs that name neither a reward nor a file."""
    for data_source in sorted(set(data_sources)):
        _by_name(data_source, "the data's data_source")


def score_by_data_source(
    *, data_source: str, solution_str: str, ground_truth: str, extra_info: Mapping[str, object]
) -> float:
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
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise RewardError(f"reward.path = {path!r}: the file failed: {type(error).__name__}: {error}") from error
    return module


def _function_of(module: ModuleType, path: str, function: str) -> RewardFunction:
    found = getattr(module, function, None)
    if not callable(found):
        known = [name for name, value in vars(module).items() if inspect.isfunction(value)]
        raise RewardError(
            f"reward.function = {function!r}: {path} has no such function. it has: {', '.join(known) or 'none'}. "
            f"{nearest(function, known)}"
        )
    try:
        inspect.signature(found).bind(data_source="", solution_str="", ground_truth="", extra_info={})
    except TypeError as error:
        raise RewardError(
            f"{function} in {path} can't be called with data_source, solution_str, ground_truth and extra_info: {error}"
        ) from error
    loaded: RewardFunction = found
    return loaded
