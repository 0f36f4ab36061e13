"""What a rank is told to start with."""

from __future__ import annotations

from dataclasses import dataclass

from megarl.roles import Role
from megarl.rollout.vllm import VllmSpec


@dataclass(frozen=True)
class RankSpec:
    """A run as every rank needs to know it, the same on all.

    engine: None where nothing is generated. algorithm_file: the user's own losses. Paths are absolute.
    """

    roles: tuple[Role, ...]
    seed: int
    engine: VllmSpec | None = None
    algorithm_file: str | None = None
