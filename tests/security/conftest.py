"""A checkpoint of a whole run's roles, made once, and copies of it to harm."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megarl.checkpoint.folder import CheckpointFolder
from megarl.checkpoint.manifest import hashed
from megarl.checkpoint.trainer_state import FILE_NAME, TrainerState, write_trainer_state
from megarl.parallel.environment import apply_environment
from megarl.parallel.layout import Layout
from megarl.parallel.platform import install_platform
from tests.security.saving import SEED, STEPS

# Test modules import megatron.core through megarl when pytest collects them: the platform has to be there first.
apply_environment()
install_platform()

from megarl.verify.roles import TRAINING, role_on  # noqa: E402
from tests.dist.ranks import cpu_pool  # noqa: E402
from tests.security.saving import save  # noqa: E402
from tests.tiny_task import write_tiny_task, write_weights  # noqa: E402


@pytest.fixture(scope="session")
def saved_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run with checkpoints of two steps: of an actor and a critic on two ranks."""
    model = write_tiny_task(tmp_path_factory.mktemp("task")) / "model"
    write_weights(model)
    roles = tuple(role_on(Layout(2, tp=2), model, name, training=TRAINING) for name in ("actor", "critic"))
    run_dir = tmp_path_factory.mktemp("run")
    checkpoints = CheckpointFolder(run_dir / "checkpoints")
    pool = cpu_pool(tmp_path_factory.mktemp("ranks"), size=2)
    for step in STEPS:
        partial = checkpoints.begin(step)
        parts = pool.run(save, roles, partial, world_size=2)
        state = TrainerState(step, step, None, parts[0].updates, {"trainer": {"seed": SEED}})
        write_trainer_state(partial, state)
        files = [file for part in parts for file in part.files]
        checkpoints.commit(partial, step, [*files, hashed(partial, FILE_NAME)], is_last=False)
    pool.stop()
    return run_dir


@pytest.fixture
def run_dir(saved_run: Path, tmp_path: Path) -> Path:
    """Return a copy of the run, to harm."""
    return Path(shutil.copytree(saved_run, tmp_path / "run", symlinks=True))


@pytest.fixture
def newest(run_dir: Path) -> Path:
    """Return the newest checkpoint of the run."""
    return run_dir / "checkpoints" / f"step_{STEPS[-1]}"
