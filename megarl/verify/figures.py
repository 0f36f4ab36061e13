"""One figure a check, one row a layout, and what they may be. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass

LOGPROBS, BF16 = "log-probs", "bf16 log-probs"
LOSS, GRAD_NORM = "loss", "grad norm"
DISTRIBUTED_LOSS, DISTRIBUTED_GRAD_NORM = "distr. loss", "distr. grad norm"
EXPORT, ENGINE = "export", "engine"
CHECKS = (LOGPROBS, BF16, LOSS, GRAD_NORM, DISTRIBUTED_LOSS, DISTRIBUTED_GRAD_NORM, EXPORT, ENGINE)
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
    """logprobs: absolute, in float32. bf16: times Hugging Face's own error in bfloat16. training: relative."""

    logprobs: float = 2e-5
    bf16: float = 2.0
    training: float = 1e-5
