"""What the controller asks of a rank beside what it asks of its roles: one value for each verb of the Worker."""

from __future__ import annotations

from dataclasses import dataclass

from megarl.checkpoint.trainer_state import TrainerState
from megarl.types import GenerationRequest, Sampling


@dataclass(frozen=True)
class GenerateWork:
    """The prompts of one engine replica, and how to sample."""

    requests: tuple[GenerationRequest, ...]
    sampling: Sampling


@dataclass(frozen=True)
class SaveWork:
    """Where to write the models, and the state of the controller beside them, None where there is none."""

    out: str
    state: TrainerState | None = None
