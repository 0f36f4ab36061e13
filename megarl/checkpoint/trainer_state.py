"""What decides later steps besides weights, as trainer_state.json beside an exported model."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from megarl.algorithm.kl_control import KLController, from_state
from megarl.errors import CheckpointError

FILE_NAME = "trainer_state.json"
_FORMAT = 1


@dataclass(frozen=True)
class TrainerState:
    """State of the controller after ``step``, the number of finished steps."""

    step: int
    policy_version: int
    kl_controller: KLController


def write_trainer_state(folder: Path, state: TrainerState) -> None:
    """Write ``folder``/trainer_state.json, which appears whole or not at all.

    JSON holds the shortest digits that give the same float again, so that what is read back is equal to the bit.
    """
    fields = {
        "format": _FORMAT,
        "step": state.step,
        "policy_version": state.policy_version,
        "kl_controller": state.kl_controller.state(),
    }
    partial = folder / f"{FILE_NAME}.partial"
    with partial.open("w") as file:
        file.write(json.dumps(fields, indent=2, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())  # else a machine that dies may leave an empty file under the final name
    partial.replace(folder / FILE_NAME)


def read_trainer_state(folder: Path) -> TrainerState:
    """Read ``folder``/trainer_state.json. Raises CheckpointError where it is missing, broken or of another format."""
    path = folder / FILE_NAME
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {FILE_NAME}; give the folder of a checkpoint, checkpoints/step_N")
    try:
        fields = json.loads(path.read_text())
    except ValueError as error:  # neither JSON nor, perhaps, text
        raise CheckpointError(f"{path} is truncated or not JSON ({error}); take another checkpoint") from error
    if not isinstance(fields, dict) or fields.get("format") != _FORMAT:
        found = fields.get("format") if isinstance(fields, dict) else None
        raise CheckpointError(f"{path} has format {found!r}, this version reads {_FORMAT}; take another checkpoint")
    control = fields.get("kl_controller")
    if not isinstance(control, dict):
        raise CheckpointError(f"{path}: kl_controller = {control!r} must be an object; take another checkpoint")
    try:
        controller = from_state(control)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}; take another checkpoint") from error
    return TrainerState(_count(path, fields, "step"), _count(path, fields, "policy_version"), controller)


def _count(path: Path, fields: dict[str, object], name: str) -> int:
    value = fields.get(name)
    if type(value) is not int or value < 0:
        raise CheckpointError(f"{path}: {name} = {value!r} must be an integer of at least 0; take another checkpoint")
    return value
