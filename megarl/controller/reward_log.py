"""What a reward function leaves in the run folder: its failures by kind, and what it printed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megarl.monitor.disk import LineFile, write_file
from megarl.reward.failures import Failures
from megarl.types import RewardResult


@dataclass
class RewardLog:
    """Writes to a run folder, and tells a person of each kind of failure once. tell: takes what they must see."""

    run_dir: Path
    tell: Callable[[str], None]
    failures: Failures = field(default_factory=Failures)

    @property
    def path(self) -> Path:
        """The file of failures."""
        return self.run_dir / "reward_failures.txt"

    def note(self, origins: Sequence[str], results: Sequence[RewardResult], printed: str) -> None:
        """Take the results of a scoring, and what was printed meanwhile. origins: of the rows of ``results``."""
        if printed:
            file = LineFile(self.run_dir / "reward_printed.txt")
            file.append(printed if printed.endswith("\n") else printed + "\n")
            file.close()
        new = self.failures.add(origins, results)
        if any(result.outcome != "ok" for result in results):
            write_file(self.path, f"{self.failures}\n")
        for kind in new:
            self.tell(f"reward function {kind}\ncounts: {self.path}")
