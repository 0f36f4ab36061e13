"""What a person reads at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megarl.monitor.console import RolloutRow, rollouts_table
from megarl.types import Metrics


@dataclass(frozen=True)
class Evaluation:
    """How good the weights after ``step`` are: ``value`` is the ``measure``, in words.

    rows: some of the rollouts, of the same prompts each time. components: means of the parts of the reward, by name.
    """

    step: int
    value: float
    measure: str
    metrics: Metrics
    rows: tuple[RolloutRow, ...] = ()
    components: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value:.3f}" for name, value in self.components.items())
        return f"{self.value:.3f}" + (f" ({parts})" if parts else "")


def final_report(evaluations: Sequence[Evaluation], run_dir: Path) -> str:
    """Return sampled validation rollouts and the measure before and after, and where the run is.

    evaluations: of the run, in order; the first is of the time before training where its step is 0.
    """
    after = evaluations[-1]
    before = evaluations[0] if evaluations[0].step == 0 else None
    parts = []
    for name, evaluation in (("before", before), ("after", after)):
        if evaluation is not None and evaluation.rows:
            table = rollouts_table(evaluation.rows)
            parts.append(f"\nvalidation rollouts {name} training (step {evaluation.step})\n{table}")
    parts.append(f"\n{after.measure}")
    if before is not None:
        parts.append(f"  before training: {before}")
    parts.append(f"  after {after.step} steps: {after}")
    parts.append(f"run folder: {run_dir}\nmodel: {run_dir / 'checkpoints' / 'final'}")
    return "\n".join(parts)
