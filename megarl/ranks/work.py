"""What the controller asks of a rank beside what it asks of its roles: one value for each verb of the Worker."""

from __future__ import annotations

from dataclasses import dataclass

from megarl.types import GenerationRequest, Sampling


@dataclass(frozen=True)
class GenerateWork:
    """The prompts of one engine replica, and how to sample."""

    requests: tuple[GenerationRequest, ...]
    sampling: Sampling


@dataclass(frozen=True)
class PublishWork:
    """The number of a publication, and whether checksums of what is sent and what arrives are compared."""

    policy_version: int
    verify: bool = False


@dataclass(frozen=True)
class SaveWork:
    """What to write into ``folder``, which is there: models as Hugging Face folders, and what a run goes on from.

    in_background: whether the ranks go on while the state is written.
    """

    folder: str
    models: bool
    state: bool
    in_background: bool
