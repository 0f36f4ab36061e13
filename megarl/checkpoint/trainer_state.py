"""What decides later steps besides what ranks hold, as trainer_state.json of a checkpoint."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megarl.algorithm.kl_control import KLController, from_state
from megarl.checkpoint.rollouts_ahead import RolloutsAhead
from megarl.errors import CheckpointError
from megarl.train.held_state import UpdateCounts
from megarl.types import Metrics

FILE_NAME = "trainer_state.json"
_FORMAT = 3


@dataclass(frozen=True)
class TrainerState:
    """State of the controller after ``step``, the number of finished steps. It is the place in the data, too.

    kl_controller: None where no rollouts are made. updates: of each role that is trained. config: of the run, resolved.
    metrics: of the step. before: the value of the validation before training, None where there was none. ahead: the
    rollouts of the next step, in a file of their own; what is read has none. skipped_in_a_row: steps up to this one
    that skipped an optimizer step. data: the fingerprint of what is trained on.
    """

    step: int
    policy_version: int
    kl_controller: KLController | None
    updates: Mapping[str, UpdateCounts] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    metrics: Metrics = field(default_factory=dict)
    before: float | None = None
    ahead: RolloutsAhead | None = None
    skipped_in_a_row: int = 0
    data: str = ""


def write_trainer_state(folder: Path, state: TrainerState) -> None:
    """Write ``folder``/trainer_state.json, which appears whole or not at all.

    JSON holds the shortest digits that give the same float again, so that what is read back is equal to the bit.
    """
    fields = {
        "format": _FORMAT,
        "step": state.step,
        "policy_version": state.policy_version,
        "kl_controller": None if state.kl_controller is None else state.kl_controller.state(),
        "updates": {name: asdict(counts) for name, counts in state.updates.items()},
        "config": state.config,
        "metrics": {name: value for name, value in state.metrics.items() if math.isfinite(value)},
        "before": state.before,
        "skipped_in_a_row": state.skipped_in_a_row,
        "data": state.data,
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
    except (ValueError, RecursionError) as error:  # neither JSON nor, perhaps, text
        raise CheckpointError(f"{path} is truncated or not JSON ({error}); take another checkpoint") from error
    if not isinstance(fields, dict) or fields.get("format") != _FORMAT:
        found = fields.get("format") if isinstance(fields, dict) else None
        raise CheckpointError(f"{path} has format {found!r}, this version reads {_FORMAT}; take another checkpoint")
    return TrainerState(
        _count(path, fields, "step"),
        _count(path, fields, "policy_version"),
        _kl_controller(path, fields.get("kl_controller")),
        _updates(path, fields.get("updates")),
        fields.get("config") or {},
        fields.get("metrics") or {},
        fields.get("before"),
        skipped_in_a_row=_count(path, fields, "skipped_in_a_row"),
        data=str(fields.get("data")),
    )


def _kl_controller(path: Path, control: object) -> KLController | None:
    if control is None:
        return None
    if not isinstance(control, dict):
        raise CheckpointError(f"{path}: kl_controller = {control!r} must be an object; take another checkpoint")
    try:
        return from_state(control)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}; take another checkpoint") from error


def _updates(path: Path, roles: object) -> dict[str, UpdateCounts]:
    if not isinstance(roles, dict) or not all(isinstance(counts, dict) for counts in roles.values()):
        raise CheckpointError(f"{path}: updates = {roles!r} must be an object of objects; take another checkpoint")
    return {
        name: UpdateCounts(_count(path, counts, "scheduled"), _count(path, counts, "adam"))
        for name, counts in roles.items()
    }


def _count(path: Path, fields: dict[str, object], name: str) -> int:
    value = fields.get(name)
    if type(value) is not int or value < 0:
        raise CheckpointError(f"{path}: {name} = {value!r} must be an integer of at least 0; take another checkpoint")
    return value
