"""Fields of a config.json, read as what they must be: anything else is an error that names the file and the field."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from reprlib import Repr
from typing import Any, NoReturn

from megarl.errors import ModelFolderError

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_SHORT.maxlevel = 3


def shown(value: Any) -> str:
    """Return a value as an error shows it: cut short where it is long or deep."""
    return _SHORT.repr(value)


def read_json(file: Path, kind: str) -> Any:
    """Return the content of a JSON file. Raises ModelFolderError, which calls it ``kind``, where it can't be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # neither JSON nor, perhaps, text
        raise ModelFolderError(f"{file} is truncated or no {kind}: it is not valid JSON: {error}") from error
    except RecursionError as error:
        raise ModelFolderError(f"{file} is nested so deep that it can't be read; it is no {kind}") from error
    except OSError as error:
        raise ModelFolderError(f"{file} can't be read: {error.strerror}") from error


class Fields:
    """A JSON object. Null is as good as absent, as transformers writes what has no value.

    source: names the file in errors. section: the field that the object stands in, empty at the top.
    """

    def __init__(self, values: Mapping[str, Any], source: str, section: str = "") -> None:
        self.values = {name: value for name, value in values.items() if value is not None}
        self.source, self.section = source, section

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def whole(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """Return a whole number from ``low`` to ``high``. Without a default it must be there."""
        if name not in self.values and default is not None:
            return default
        value = self._present(name)
        is_whole = type(value) is int or (type(value) is float and value.is_integer())
        if not (is_whole and low <= value <= high):
            self.refuse(name, f"must be a whole number from {low:,} to {high:,}")
        return int(value)

    def number(self, name: str, low: float, high: float, default: float | None = None, *, above: bool = False) -> float:
        """Return a finite number from ``low``, or above it, to ``high``. Without a default it must be there."""
        if name not in self.values and default is not None:
            return default
        value = self._present(name)
        # NaN is neither above nor below anything.
        if type(value) not in (int, float) or not (low <= value <= high) or (above and value == low):
            self.refuse(name, f"must be a number {'above' if above else 'from'} {low:g}, and at most {high:g}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """Return true or false."""
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            self.refuse(name, "must be true or false")
        return bool(value)

    def word(self, name: str, default: str) -> str:
        """Return a text."""
        value = self.values.get(name, default)
        if not isinstance(value, str):
            self.refuse(name, "must be a text")
        return str(value)

    def items(self, name: str, kind: type, what: str) -> tuple[Any, ...]:
        """Return a list of ``kind`` as a tuple, empty where it is absent. what: its items, in the plural."""
        value = self.values.get(name, [])
        if not isinstance(value, list) or any(type(item) is not kind for item in value):
            self.refuse(name, f"must be a list of {what}")
        return tuple(value)

    def inner(self, name: str) -> Fields:
        """Return an object within, empty where it is absent."""
        value = self.values.get(name, {})
        if not isinstance(value, dict):
            self.refuse(name, "must be an object with fields of its own")
        return Fields(value, self.source, name)

    def only(self, name: str, allowed: Iterable[Any]) -> None:
        """Refuse any value of a field but ``allowed`` ones and null."""
        allowed = tuple(allowed)
        if name in self.values and self.values[name] not in allowed:
            known = " or ".join(json.dumps(value) for value in allowed or (None,))
            self.refuse(name, f"is not supported, only {known}")

    def refuse(self, name: str, why: str) -> NoReturn:
        """Raise ModelFolderError for the value of a field."""
        key = f"{self.section}.{name}" if self.section else name
        key = key.encode("ascii", "backslashreplace").decode()  # the user's own words, perhaps not printable
        raise ModelFolderError(f"{self.source}: {key} = {shown(self.values.get(name))} {why}")

    def _present(self, name: str) -> Any:
        if name not in self.values:
            where = f", in {self.section}" if self.section else ""
            raise ModelFolderError(f"{self.source} lacks the field {name!r}{where}")
        return self.values[name]
