"""A Hugging Face folder of a checkpoint: ``python -m megarl.export RUN --out DIR [--step N] [--role critic]``."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megarl.checkpoint.folder import CheckpointFolder, verified_state
from megarl.checkpoint.merged import MergedRole, saved_adapters
from megarl.checkpoint.role_files import SavedRole
from megarl.config.compose import errors_reported
from megarl.errors import CheckpointError
from megarl.monitor.disk import refusals_named
from megarl.roles import DTYPE_BYTES
from megarl.weights.adapters import Lora
from megarl.weights.any_model import read_shape
from megarl.weights.config_fields import read_json
from megarl.weights.hf_export import export_source
from megarl.weights.model_shape import ModelShape
from megarl.weights.name_map import hf_shapes, hf_zeros
from megarl.weights.sources import SafetensorsSource, TensorSource, drawn_weights


def main(arguments: Sequence[str] | None = None) -> int:
    """Verify a checkpoint and write the weights of one of its roles as a Hugging Face folder, a file at a time."""
    parser = argparse.ArgumentParser("python -m megarl.export", description=main.__doc__)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, which must not exist")
    parser.add_argument("--step", type=int, help="checkpoint to take; the latest unless given")
    parser.add_argument("--role", choices=("actor", "critic"), default="actor", help="the actor unless given")
    parser.add_argument("--dtype", choices=tuple(DTYPE_BYTES), help="that of the run unless given")
    parser.add_argument("--model", type=Path, help="what adapters belong to, where the run's model is no longer there")
    given = parser.parse_args(arguments)
    with errors_reported():
        folder = _checkpoint(CheckpointFolder(given.run / "checkpoints"), given.step)
        export(folder, given.role, given.out, given.dtype, given.model)
        print(f"the {given.role} after step {folder.name.removeprefix('step_')}: {given.out}")
    return 0


def _checkpoint(checkpoints: CheckpointFolder, step: int | None) -> Path:
    """Return the checkpoint of a step, or the newest. Raises CheckpointError where there is none."""
    steps = checkpoints.steps()
    if not steps:
        raise CheckpointError(f"{checkpoints.path} has no checkpoint; give the folder of a run that saved one")
    if step is not None and step not in steps:
        raise CheckpointError(f"{checkpoints.path} has no step {step}; it has {', '.join(map(str, steps))}")
    return checkpoints.of(steps[-1] if step is None else step)


def export(folder: Path, role: str, out: Path, dtype: str | None, base: Path | None) -> None:
    """Write a role of a checkpoint to ``out``, in the run's dtype where it is None. base: what adapters belong to.

    Adapters are merged, and besides in the folder ``adapter``. Raises CheckpointError where the checkpoint isn't as it
    was saved, or ``out`` exists; ResourceError where the disk refuses it.
    """
    if out.exists():
        raise CheckpointError(f"{out} exists; an export never writes over another folder")
    parent = next(path for path in out.absolute().parents if path.exists())
    if not parent.is_dir():
        raise CheckpointError(f"{out} can't be made: {parent} is no folder; name another one with --out")
    config = verified_state(folder).config
    template = folder if role == "actor" else folder / role
    saved, shape = SavedRole(folder, role), read_shape(template)
    run_dtype = getattr(torch, read_json(template / "config.json", "model configuration")["dtype"])
    shape = shape.with_value_head() if role == "critic" else shape
    lora = _lora(config) if role == "actor" else None
    source: TensorSource = saved
    if lora is not None:
        source = MergedRole(_base(config, base, shape, template), saved, shape, lora, run_dtype)
    partial = out.with_name(f".{out.name}.partial")
    with refusals_named(out):
        shutil.rmtree(partial, ignore_errors=True)
        export_source(
            partial,
            source=source,
            template=template,
            shapes=hf_shapes(shape),
            dtype=getattr(torch, dtype) if dtype else run_dtype,
            zeros=hf_zeros(shape),
            fields=shape.critic_fields() if shape.value_head else {},
        )
        if lora is not None:
            from megarl.train.fsdp.lora import write_adapters  # here, since it loads transformers and peft

            name = _model(config).get("path")
            write_adapters(saved_adapters(saved, shape, lora), lora, shape, name, partial / "adapter")
        partial.rename(out)


def _model(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the section of the actor's model in a saved run's configuration."""
    section: Mapping[str, Any] = config.get("actor_rollout_ref", config).get("model", {})
    return section


def _lora(config: Mapping[str, Any]) -> Lora | None:
    """Return the adapters that the actor of a saved run trains, None where it trains all."""
    model = _model(config)
    if not model.get("lora_rank"):
        return None
    return Lora(model["lora_rank"], model["lora_alpha"], tuple(model["target_modules"]))


def _base(config: Mapping[str, Any], given: Path | None, shape: ModelShape, template: Path) -> TensorSource:
    """Return the weights that adapters belong to: of the folder that is given, or those that the run started from."""
    model = _model(config)
    if given is None and model.get("init") == "random":
        return drawn_weights(shape, template, config["trainer"]["seed"])
    folder = given or Path(str(model.get("path"))).expanduser()
    if not folder.is_dir():
        raise CheckpointError(
            f"the adapters of this checkpoint belong to the model {folder}, which is no folder here; "
            "fix: --model=FOLDER of that model, or start in the folder that the run was started in"
        )
    return SafetensorsSource(folder, shape)


if __name__ == "__main__":
    sys.exit(main())
