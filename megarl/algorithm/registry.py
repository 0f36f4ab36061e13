"""Names in a config to functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from megarl.errors import ConfigError, Problem, nearest

F = TypeVar("F")


class Registry(Generic[F]):
    """The functions that one config key selects by name.

    Each registry lives in the module of its built-in entries, so whoever can look a name up has them all.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self._entries: dict[str, F] = {}

    def register(self, name: str) -> Callable[[F], F]:
        """Enter the decorated function under ``name``. Raises ConfigError where the name is taken."""

        def enter(entry: F) -> F:
            if name in self._entries:
                taken = "a name not yet registered: one name selects one function"
                raise ConfigError([Problem(self.key, name, taken, "register your function under another name")])
            self._entries[name] = entry
            return entry

        return enter

    def get(self, name: str, key: str | None = None) -> F:
        """Return the entry called ``name``. Raises ConfigError with the nearest known name.

        key: the dotted key the name was read from, where it isn't the registry's own.
        """
        if name not in self._entries:
            allowed = f"one of {', '.join(self.names())}"
            raise ConfigError([Problem(key or self.key, name, allowed, nearest(name, self._entries))])
        return self._entries[name]

    def forget(self, names: Iterable[str]) -> None:
        """Take out what is registered under ``names``."""
        for name in names:
            del self._entries[name]

    def names(self) -> tuple[str, ...]:
        """Return all registered names, sorted."""
        return tuple(sorted(self._entries))
