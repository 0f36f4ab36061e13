"""From a checked config to a running group of ranks, and back to nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megarl.config.rules import num_ranks
from megarl.config.schema import PPOConfig, SFTConfig
from megarl.controller.rank import RunSpec
from megarl.controller.worker_group import WorkerGroup
from megarl.errors import ConfigError, ModelFolderError, Problem
from megarl.parallel.environment import apply_environment


def resolve_model_folder(path: str) -> str:
    """Return the local folder of a model: itself, or the snapshot in the Hugging Face cache that bears its name.

    Raises ModelFolderError where it is neither.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return str(folder.resolve())
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return str(snapshot_download(path, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise ModelFolderError(
            f"model.path = {path!r} is neither a folder nor a model in the local Hugging Face cache; "
            f"give a folder, or download it first: hf download {path}"
        ) from error


def serve_if_not_controller() -> bool:
    """Serve until the run ends, if torchrun made this process a rank other than 0; return whether it was one."""
    if not _torchrun_rank():
        return False
    apply_environment()
    from megarl.controller.torchrun_cluster import serve

    serve()
    return True


@contextmanager
def worker_group(run: RunSpec) -> Iterator[WorkerGroup]:
    """Start all ranks of a run, under torchrun or on Ray, and end them afterwards."""
    group: WorkerGroup
    trainer = run.config.trainer
    if _torchrun_rank() is not None:
        from megarl.controller.torchrun_cluster import TorchrunGroup

        group = TorchrunGroup(run)
    else:
        from megarl.controller.ray_cluster import RayGroup

        group = RayGroup(
            run, nnodes=trainer.nnodes, ranks_per_node=trainer.n_gpus_per_node, dashboard=trainer.ray_dashboard
        )
    try:
        yield group
    except BaseException:
        group.abort()
        raise
    group.shutdown()


def check_world_size(config: PPOConfig | SFTConfig) -> None:
    """Raise ConfigError where torchrun started another number of ranks than the config names."""
    if _torchrun_rank() is None:
        return
    started, named = int(os.environ["WORLD_SIZE"]), num_ranks(config)
    if started != named:
        allowed = f"torchrun started {started} ranks, the config says {named}"
        fix = f"torchrun --nproc-per-node={config.trainer.n_gpus_per_node}, or change trainer.n_gpus_per_node"
        raise ConfigError([Problem("trainer.nnodes x trainer.n_gpus_per_node", named, allowed, fix)])


def _torchrun_rank() -> int | None:
    """Return this process's rank if torchrun started it."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else None
