"""The checkpoints of a run: ``python -m megarl.checkpoints RUN [--verify] [--keep N [--best-by METRIC]]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megarl.checkpoint.folder import CheckpointFolder, Kept, verified
from megarl.checkpoint.manifest import read_manifest
from megarl.checkpoint.trainer_state import read_trainer_state
from megarl.config.compose import errors_reported
from megarl.errors import CheckpointError
from megarl.monitor.rundir import is_in_use


def main(arguments: Sequence[str] | None = None) -> int:
    """List a run's checkpoints, verify or prune them; return 1 where one isn't as it was saved."""
    parser = argparse.ArgumentParser("python -m megarl.checkpoints", description=main.__doc__)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--verify", action="store_true", help="read every byte and compare it with what was saved")
    parser.add_argument("--keep", type=int, metavar="N", help="remove all but the newest N")
    parser.add_argument("--best-by", metavar="METRIC", help="and but the one where METRIC is largest (-METRIC: least)")
    given = parser.parse_args(arguments)
    if given.keep is not None and given.keep < 1:
        parser.error(f"--keep {given.keep} must be at least 1")
    if given.best_by is not None and given.keep is None:
        parser.error("--best-by says which stays besides those of --keep")
    folder = CheckpointFolder(given.run / "checkpoints")
    with errors_reported():
        if not folder.steps():
            raise CheckpointError(f"{folder.path} has no checkpoint; give the folder of a run that saved one")
        if given.keep is not None and is_in_use(given.run):
            raise CheckpointError(
                f"{given.run} has a run that is going on; trainer.keep_checkpoints prunes it meanwhile"
            )
        if given.keep is not None:
            _refuse_to_lose(folder, given.best_by)
            for step in folder.prune(Kept(given.keep, given.best_by)):
                print(f"step {step:>6}  removed")
        return max([_show(folder, step, given.verify) for step in folder.steps()])


def _refuse_to_lose(folder: CheckpointFolder, best_by: str | None) -> None:
    """Raise CheckpointError where the newest, which stays, isn't whole, or where no checkpoint has the metric."""
    verified(folder.of(folder.steps()[-1]))
    if best_by is not None and folder.best(best_by) is None:
        known = ", ".join(sorted({name for step in folder.steps() for name in folder.metrics(step)})) or "no metric"
        raise CheckpointError(f"no checkpoint of {folder.path} has the metric {best_by!r}; they have {known}")


def _show(folder: CheckpointFolder, step: int, must_verify: bool) -> int:
    """Print a line on a checkpoint; return 1 where it isn't as it was saved."""
    try:
        manifest = (verified if must_verify else read_manifest)(folder.of(step))
        state = read_trainer_state(folder.of(step))
    except CheckpointError as error:
        print(f"step {step:>6}  DAMAGED: {error}")
        return 1
    num_bytes = sum(file.num_bytes for file in manifest.files)
    roles = ", ".join(state.updates) or "models alone"
    reward = state.metrics.get("val/reward_mean")
    told = "" if reward is None else f"  val/reward_mean {reward:.3f}"
    print(f"step {step:>6}  {num_bytes / 2**20:>10,.1f} MiB  {roles}{'  verified' if must_verify else ''}{told}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
