"""A Hugging Face folder of a checkpoint: ``python -m megarl.export RUN --out DIR [--step N] [--role critic]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from megarl.checkpoint.folder import CheckpointFolder
from megarl.checkpoint.manifest import read_manifest, verify
from megarl.checkpoint.role_files import SavedRole
from megarl.config.compose import errors_reported
from megarl.errors import CheckpointError
from megarl.roles import DTYPE_BYTES
from megarl.weights.any_model import read_shape
from megarl.weights.config_fields import read_json
from megarl.weights.hf_export import export_source
from megarl.weights.name_map import hf_shapes, hf_zeros


def main(arguments: Sequence[str] | None = None) -> int:
    """Verify a checkpoint and write the weights of one of its roles as a Hugging Face folder, a file at a time."""
    parser = argparse.ArgumentParser("python -m megarl.export", description=main.__doc__)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, which must not exist")
    parser.add_argument("--step", type=int, help="checkpoint to take; the latest unless given")
    parser.add_argument("--role", choices=("actor", "critic"), default="actor", help="the actor unless given")
    parser.add_argument("--dtype", choices=tuple(DTYPE_BYTES), help="that of the run unless given")
    given = parser.parse_args(arguments)
    with errors_reported():
        export(CheckpointFolder(given.run / "checkpoints"), given.step, given.role, given.out, given.dtype)
    return 0


def export(checkpoints: CheckpointFolder, step: int | None, role: str, out: Path, dtype: str | None) -> None:
    """Write a role of a checkpoint to ``out``, in the run's dtype where it is None.

    Raises CheckpointError where there is no such checkpoint, it isn't as it was saved, or ``out`` exists.
    """
    steps = checkpoints.steps()
    if not steps or (step is not None and step not in steps):
        there = f"it has {', '.join(map(str, steps))}" if steps else "it has none"
        raise CheckpointError(f"{checkpoints.path} has no checkpoint of step {step}: {there}")
    if out.exists():
        raise CheckpointError(f"{out} exists; an export never writes over another folder")
    folder = checkpoints.of(steps[-1] if step is None else step)
    verify(folder, read_manifest(folder))
    template = folder if role == "actor" else folder / role
    shape = read_shape(template)
    shape = shape.with_value_head() if role == "critic" else shape
    saved = read_json(template / "config.json", "model configuration")
    export_source(
        out,
        source=SavedRole(folder, role),
        template=template,
        shapes=hf_shapes(shape),
        dtype=getattr(torch, dtype or saved["dtype"]),
        zeros=hf_zeros(shape),
        fields=shape.critic_fields() if shape.value_head else {},
    )
    print(f"the {role} after step {folder.name.removeprefix('step_')}: {out}")


if __name__ == "__main__":
    sys.exit(main())
