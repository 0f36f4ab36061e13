"""Turn a composed mapping into the schema's frozen dataclasses; report every unknown, missing or wrong key together."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from megarl.config.verl_keys import ours_for
from megarl.errors import Absent, ConfigError, Problem, nearest

T = TypeVar("T")
NO_SUCH_KEY = "no such key"


def build_config(cls: type[T], values: Mapping[str, Any]) -> T:
    """Return ``cls`` filled from ``values``. Raises ConfigError with all problems of types, ranges and names."""
    problems: list[Problem] = []
    config = _section(cls, values, "", problems)
    if problems:
        raise ConfigError(problems)
    return typing.cast(T, config)


def _section(cls: Any, values: Any, prefix: str, problems: list[Problem]) -> Any:
    """Fill one dataclass; where something is wrong, note it and leave None in its place."""
    if not isinstance(values, Mapping):
        problems.append(Problem(prefix.rstrip("."), values, "must be a section with keys of its own"))
        return None
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name in (n for n in values if n not in fields):
        path = f"{prefix}{name}"
        known = fields if prefix else (*fields, "experiment")
        hints_at = [hint for hint in (ours_for(path, values[name]), nearest(str(name), known)) if hint]
        fix = "; ".join(hints_at) or f"keys here: {', '.join(fields)}"
        problems.append(Problem(path, values[name], NO_SUCH_KEY, fix))
    hints = typing.get_type_hints(cls)
    found = {}
    for name, field in fields.items():
        path, optional = f"{prefix}{name}", section_of(hints[name])
        if optional is not None:
            is_given = values.get(name) is not None
            found[name] = _section(optional, values[name], f"{path}.", problems) if is_given else None
        elif name not in values:
            fix = f"start from one of megarl's own configs, or set {path}"
            problems.append(Problem(path, Absent(), "is missing", fix))
        elif typing.get_origin(hints[name]) is tuple and dataclasses.is_dataclass(typing.get_args(hints[name])[0]):
            found[name] = _sections(typing.get_args(hints[name])[0], values[name], path, problems)
        elif dataclasses.is_dataclass(hints[name]):
            found[name] = _section(hints[name], values[name], f"{path}.", problems)
        else:
            found[name] = _leaf(hints[name], values[name], path, field.metadata, problems)
    return None if len(found) < len(fields) else cls(**found)


def section_of(kind: Any) -> Any:
    """Return the dataclass of a section that may be left out, None for any other kind of key."""
    inner = (
        [k for k in typing.get_args(kind) if dataclasses.is_dataclass(k)] if isinstance(kind, types.UnionType) else []
    )
    return inner[0] if inner else None


def _sections(cls: Any, values: Any, path: str, problems: list[Problem]) -> Any:
    """Fill a list of dataclasses."""
    if not isinstance(values, list | tuple):
        problems.append(Problem(path, values, "must be a list of sections"))
        return ()
    return tuple(_section(cls, value, f"{path}[{i}].", problems) for i, value in enumerate(values))


def _leaf(kind: Any, value: Any, path: str, rule: Mapping[str, Any], problems: list[Problem]) -> Any:
    """Convert and check one value."""
    converted, allowed = _convert(kind, value)
    if allowed is None and isinstance(converted, int | float) and not isinstance(converted, bool):
        allowed = _out_of_range(converted, rule)
        if allowed is not None and isinstance(kind, types.UnionType):
            allowed = f"{allowed}, or null"
    if allowed is None and converted is not None and rule["choices"] and converted not in rule["choices"]:
        allowed = f"must be one of {', '.join(rule['choices'])}"
        problems.append(Problem(path, value, allowed, nearest(str(value), rule["choices"])))
        return None
    if allowed is not None:
        problems.append(Problem(path, value, allowed))
        return None
    return converted


def _convert(kind: Any, value: Any) -> tuple[Any, str | None]:
    """Return (value as ``kind``, None), or (None, what is allowed)."""
    if isinstance(kind, types.UnionType):  # X | None
        inner = next(k for k in typing.get_args(kind) if k is not type(None))
        if value is None:
            return None, None
        converted, allowed = _convert(inner, value)
        return converted, f"{allowed}, or null" if allowed else None
    if typing.get_origin(kind) is Mapping:
        if isinstance(value, Mapping) and all(isinstance(k, str) for k in value):
            return dict(value), None
        return None, "must be a section of names and values"
    if typing.get_origin(kind) is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            return None, "must be a list"
        pairs = [_convert(typing.get_args(kind)[0], item) for item in items]
        wrong = next((allowed for _, allowed in pairs if allowed), None)
        return tuple(v for v, _ in pairs), f"each item {wrong}" if wrong else None
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:  # YAML 1.1 reads 1e-6 as a string
            return float(value), None
        except ValueError:
            return None, "must be a number"
    if type(value) is not kind:
        names = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
        return None, f"must be {names[kind]}"
    return value, None


def _out_of_range(value: float, rule: Mapping[str, Any]) -> str | None:
    """Return the sentence of the bound that a number breaks, None where it is within its range."""
    low, above, high = rule["low"], rule["above"], rule["high"]
    if math.isnan(value) or math.isinf(value):
        return "must be a finite number"
    if low is not None and value < low:
        return f"must be at least {number_in_words(low)}"
    if above is not None and value <= above:
        return f"must be greater than {number_in_words(above)}"
    if high is not None and value > high:
        return f"must be at most {number_in_words(high)}"
    return None


def number_in_words(bound: float) -> str:
    """Return a bound as a person writes it: in full where it is a whole number that a person would count to."""
    return f"{bound:.0f}" if float(bound).is_integer() and abs(bound) < 1e9 else f"{bound:g}"
