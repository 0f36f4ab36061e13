"""What the checks of a run have found so far, so that one mistake hides no other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megarl.errors import ConfigError, MegarlError, Problem


class Findings:
    """Problems and errors so far. A single error stays what it is; several become one ConfigError.

    notes: where given, what isn't on this machine is noted there instead.
    """

    def __init__(self, notes: list[str] | None = None) -> None:
        self.problems: list[Problem] = []
        self.errors: list[tuple[str, object, MegarlError]] = []
        self.notes = notes

    @contextmanager
    def of(self, key: str, value: object) -> Iterator[None]:
        """Keep what goes wrong inside, as said by ``key``."""
        try:
            yield
        except ConfigError as error:
            self.problems += error.problems
        except MegarlError as error:
            self.errors.append((key, value, error))

    def finish(self) -> None:
        """Raise what was found, if anything."""
        if len(self.errors) == 1 and not self.problems:
            raise self.errors[0][2]
        problems = [*self.problems, *(Problem(key, value, str(error)) for key, value, error in self.errors)]
        if problems:
            raise ConfigError(problems)
