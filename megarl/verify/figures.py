"""One figure a check, one row a layout, and what they may be. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass

LOGPROBS, BF16 = "log-probs", "bf16 log-probs"
LOSS, GRAD_NORM, DISTRIBUTED_GRAD_NORM = "loss", "grad norm", "distr. grad norm"
LATER_LOSSES, DISTRIBUTED_LATER_LOSSES = "later losses", "distr. later losses"
EXPORT, ENGINE = "export", "engine"
CHECKS = (
    *(LOGPROBS, BF16, LOSS, GRAD_NORM, DISTRIBUTED_GRAD_NORM),
    *(LATER_LOSSES, DISTRIBUTED_LATER_LOSSES, EXPORT, ENGINE),
)
_COUNTED = (EXPORT, ENGINE)


@dataclass(frozen=True)
class Figure:
    """What a check measured. of: how many were compared, where ``value`` counts those that differ."""

    check: str
    value: float
    tolerance: float
    of: int = 0

    @property
    def passes(self) -> bool:
        """Whether the value is within its tolerance; one that isn't a number isn't."""
        return self.value <= self.tolerance

    def __str__(self) -> str:
        if self.check in _COUNTED:
            text = "equal" if self.value == 0 else f"{self.value:.0f} of {self.of} differ"
        else:
            text = f"{self.value:.1e}"
        return text if self.passes else f"{text} OVER {self.tolerance:.1e}"


@dataclass(frozen=True)
class Row:
    """A layout of a model: its figures by check, or why there is none."""

    model: str
    layout: str
    num_ranks: int
    figures: dict[str, Figure]
    time_s: float
    error: str = ""

    @property
    def passes(self) -> bool:
        """Whether every figure is within its tolerance."""
        return not self.error and all(figure.passes for figure in self.figures.values())


@dataclass(frozen=True)
class Tolerances:
    """How many times Hugging Face's own errors ours may be.

    logprobs: the largest, in float32. bf16: the mean, in bfloat16. training: the loss of the first optimizer step, in
    errors of a log-prob, and its gradient norm, in those of the gradient. later: the losses of later steps.
    """

    logprobs: float = 4.0
    bf16: float = 2.0
    training: float = 4.0
    later: float = 20.0
