"""Rollouts of the next step that were sampled before a checkpoint was saved, as rollouts_ahead.json in it.

Another run of the same step would sample others: the weights that sampled these are older than the checkpoint's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megarl.errors import CheckpointError
from megarl.types import Group, Rollout

FILE_NAME = "rollouts_ahead.json"


@dataclass(frozen=True)
class RolloutsAhead:
    """The rollouts of each prompt of ``step``, in order."""

    step: int
    groups: Sequence[Group]


def write_rollouts_ahead(folder: Path, ahead: RolloutsAhead) -> None:
    """Write ``folder``/rollouts_ahead.json. JSON holds the digits that give the same float again."""
    groups = [[[r.token_ids, r.logprobs, r.finish_reason, r.policy_version] for r in group] for group in ahead.groups]
    (folder / FILE_NAME).write_text(json.dumps({"step": ahead.step, "groups": groups}, allow_nan=False) + "\n")


def read_rollouts_ahead(folder: Path) -> RolloutsAhead | None:
    """Return what ``write_rollouts_ahead`` wrote, None where nothing was. Raises CheckpointError for anything else."""
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    try:
        fields = json.loads(path.read_text())
        groups = tuple(tuple(_rollout(*values) for values in group) for group in fields["groups"])
        return RolloutsAhead(int(fields["step"]), groups)
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} isn't as it was saved ({error}); take another checkpoint") from error


def _rollout(token_ids: list[int], logprobs: list[float], finish_reason: str, policy_version: int) -> Rollout:
    return Rollout(tuple(map(int, token_ids)), tuple(map(float, logprobs)), str(finish_reason), int(policy_version))
