"""What a rank holds of a role, in bytes."""

from __future__ import annotations

from dataclasses import dataclass

FP32_BYTES = 4


@dataclass(frozen=True)
class StaticBytes:
    """What one rank holds of one role; some of it may be elsewhere between uses."""

    parameters: int
    gradients: int = 0
    optimizer: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer
