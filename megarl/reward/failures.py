"""The failures of a reward function over a run, by kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from megarl.types import RewardResult


@dataclass
class FailureKind:
    """Failures of one cause. first: the result of the first of them. origin: its row."""

    first: RewardResult
    origin: str
    count: int = 0

    def __str__(self) -> str:
        times = "1 rollout" if self.count == 1 else f"{self.count} rollouts"
        text = f"{self.first.outcome}: {times}. the first, {self.origin}: {self.first.detail}"
        return f"{text}\n{self.first.traceback}".rstrip()


@dataclass
class Failures:
    """What failed so far, with the first of each kind and their count."""

    kinds: dict[str, FailureKind] = field(default_factory=dict)

    def add(self, origins: Sequence[str], results: Sequence[RewardResult]) -> list[FailureKind]:
        """Count the failures among results; return the kinds that are new. origins: their rows."""
        known = set(self.kinds)
        for origin, result in zip(origins, results, strict=True):
            if result.outcome != "ok":
                self.kinds.setdefault(result.kind, FailureKind(result, origin)).count += 1
        return [kind for name, kind in self.kinds.items() if name not in known]

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.kinds.values()))
