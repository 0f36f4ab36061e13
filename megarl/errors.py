"""Named errors. A user's mistake names the key or file, the value, what is allowed and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class MegarlError(Exception):
    """Base of every error that a user can cause or must act on. Its text is complete without a traceback."""


class Absent:
    """The value of what has none, like a flag that doesn't exist: a Problem prints it as nothing."""


@dataclass(frozen=True)
class Problem:
    """One mistake in a configuration.

    key: dotted key as the user types it; value: what was found; allowed: what would be right; fix: what to type;
    origin: where the value was set, filled in when the error is reported (see megarl/config/provenance.py).
    """

    key: str
    value: object
    allowed: str
    fix: str = ""
    origin: str = ""

    def __str__(self) -> str:
        origin = f"  ({self.origin})" if self.origin else ""
        value = "" if isinstance(self.value, Absent) else f" = {self.value!r}"
        text = f"{self.key}{value}{origin}: {self.allowed}"
        return f"{text}\n      fix: {self.fix}" if self.fix else text


class ConfigError(MegarlError):
    """A configuration with one or more problems, all reported together."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        lines = "\n".join(f"  {i}. {p}" for i, p in enumerate(self.problems, 1))
        plural = "" if len(self.problems) == 1 else "s"
        super().__init__(f"{len(self.problems)} problem{plural} in the configuration:\n{lines}")

    def __reduce__(self) -> tuple[type[ConfigError], tuple[Sequence[Problem]]]:
        return type(self), (self.problems,)


class ModelFolderError(MegarlError):
    """A Hugging Face folder that can't be used: no config.json, unknown architecture, missing or truncated weights."""


class DataError(MegarlError):
    """A data file that can't be used: missing column, null or empty prompt, truncated file, no rows left."""


class RewardError(MegarlError):
    """A reward function that can't be loaded. (One that fails on a rollout is scored as configured and counted.)"""


class AlgorithmError(MegarlError):
    """An advantage estimator or policy loss of the user's that failed, or returned what can't be used."""


class CheckpointError(MegarlError):
    """A checkpoint that can't be read: a file that is missing, truncated or not of this format."""


class ResourceError(MegarlError):
    """The machine lacks something the run needs: ranks, shared memory, disk."""


class PublishError(MegarlError):
    """Weights in the rollout engine differ from the trainer's after a publish, or a parameter has no source."""


class WorkerError(MegarlError):
    """A rank failed or died. Carries the first traceback."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``did you mean 'x'?`` for the known name closest to ``name``, or an empty string.

    The one name that ``name`` is the beginning of is closer than any that is spelled alike.
    """
    known = list(known)
    longer = [other for other in known if len(name) > 3 and other.startswith(name)]
    match = longer if len(longer) == 1 else difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {match[0]!r}?" if match else ""
