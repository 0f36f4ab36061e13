"""Where a run goes on from, and what of its configuration may differ from that of the run that was saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarl.checkpoint.folder import CheckpointFolder, verified_state
from megarl.checkpoint.trainer_state import TrainerState
from megarl.config.schema import SFTTrainerConfig
from megarl.errors import CheckpointError, ConfigError, Problem
from megarl.monitor.rundir import forget_later_steps
from megarl.ranks.spec import Resumed

AUTO, NEVER = "auto", "never"

# Keys, and parts of keys, whose change leaves what a run computes as it is: how long it is, what it tells, and how its
# work is laid out.
_MAY_DIFFER = (
    "trainer.",
    "data.val_",
    "data.max_val_prompts",
    "actor_rollout_ref.rollout.val_kwargs",
    "actor_rollout_ref.rollout.tensor_model_parallel_size",
    "actor_rollout_ref.rollout.gpu_memory_utilization",
    "actor_rollout_ref.rollout.max_num",
    "actor_rollout_ref.rollout.enforce_eager",
    "actor_rollout_ref.rollout.free_cache_engine",
    "actor_rollout_ref.rollout.disable_log_stats",
    "actor_rollout_ref.rollout.placement",
    "actor_rollout_ref.rollout.verify_publish",
    "actor_rollout_ref.rollout.nnodes",
    "actor_rollout_ref.rollout.n_gpus_per_node",
    "reward.num_workers",
    "reward.timeout_s",
    "reward.batch_timeout_s",
    "reward.try_first",
)
_PARTS_THAT_MAY_DIFFER = (
    *("megatron", "fsdp_config", "strategy", "micro_batch", "dynamic_bsz", "max_token_len", "use_fused_kernels"),
    *("use_remove_padding", "ulysses"),
)
_BUT_NOT = (
    "trainer.seed",
    "trainer.mode",
    "trainer.max_staleness",
    "data.val_batch_size",
    "override_transformer_config",
)


@dataclass(frozen=True)
class Resumption:
    """The checkpoint that a run goes on from. notes: lines on it for a person."""

    folder: Path
    state: TrainerState
    notes: tuple[str, ...] = ()

    @property
    def on_ranks(self) -> Resumed:
        """What ranks need to know of it."""
        return Resumed(str(self.folder), self.state.updates)


def find_resumption(
    trainer: SFTTrainerConfig, run_dir: Path, values: Mapping[str, Any], overrides: Sequence[str], data: str
) -> Resumption | None:
    """Return the Resumption of a run, None where it starts anew. Every byte of the checkpoint is verified first.

    values: the run's configuration, resolved. overrides: what was typed: a key among them may differ from the saved
    run's, since it was changed on purpose. Raises CheckpointError for a checkpoint that isn't as it was saved, and
    ConfigError for keys that differ unseen.
    """
    if trainer.resume == NEVER:
        return None
    checkpoints = CheckpointFolder(run_dir / "checkpoints")
    checkpoints.remove_leftovers()
    found = _newest(checkpoints, trainer.resume_from_older)
    if trainer.resume != AUTO:
        path = checkpoint_at(trainer.resume)
        found = Resumption(path, verified_state(path)) if found is None else _begun_at(found, trainer.resume)
    if found is None:
        return None
    if not found.state.updates:
        raise CheckpointError(f"{found.folder} has no state to go on from: it was saved without; start from its model")
    changes = [*_changes(found.state.config, values)]
    if not any(_decides_on_rows(change.key) for change in changes):
        changes += _changed_rows(found.state, values, data)
    unseen = [change for change in changes if not _is_typed(change.key, overrides)]
    if unseen:
        raise ConfigError(unseen)
    notes = [f"going on after step {found.state.step} from {found.folder}"]
    notes += [f"  {change.key} = {change.value!r}, {change.allowed}" for change in changes]
    print("\n".join((*found.notes, *notes)), flush=True)
    forget_later_steps(run_dir, found.state.step)
    return found


def is_finished(resumption: Resumption | None, num_steps: int, run_dir: Path) -> bool:
    """Whether a run that goes on has no step left; says so, and links its last checkpoint if its end hadn't yet."""
    if resumption is None or resumption.state.step < num_steps:
        return False
    CheckpointFolder(run_dir / "checkpoints").link_final(num_steps)
    print(f"all {num_steps} steps are done; trainer.total_training_steps or trainer.total_epochs makes the run longer")
    return True


def checkpoint_at(path: str) -> Path:
    """Return the folder of the checkpoint that a path names: itself, or the newest of a run's folder."""
    folder = Path(path).expanduser().absolute()
    for checkpoints in (CheckpointFolder(folder / "checkpoints"), CheckpointFolder(folder)):
        if steps := checkpoints.steps():
            return checkpoints.of(steps[-1])
    return folder


def _newest(checkpoints: CheckpointFolder, may_be_older: bool) -> Resumption | None:
    """Return the newest whole checkpoint; damaged ones raise, or are set aside where an older one ``may_be`` taken.

    Raises CheckpointError as well where there are checkpoints, and none is whole.
    """
    damaged: dict[int, CheckpointError] = {}
    for step in reversed(checkpoints.steps()):
        try:
            state = verified_state(checkpoints.of(step))
        except CheckpointError as error:
            if not may_be_older:
                raise CheckpointError(
                    f"{error}, as trainer.resume_from_older=true does: it sets this one aside"
                ) from error
            damaged[step] = error
        else:
            notes = [f"DAMAGED: {error}; it is now {checkpoints.set_aside(n)}" for n, error in damaged.items()]
            return Resumption(checkpoints.of(step), state, tuple(notes))
    if damaged:
        found = "\n  ".join(map(str, damaged.values()))
        raise CheckpointError(f"no checkpoint of {checkpoints.path} is whole; start in another folder\n  {found}")
    return None


def _begun_at(own: Resumption, resume: str) -> Resumption:
    """Return the newest checkpoint of the run's own folder, if the run in it began at the checkpoint that is named."""
    began = own.state.config.get("trainer", {}).get("resume")
    if began == resume:
        return own
    allowed = f"the folder has the checkpoints of a run with trainer.resume = {began!r}"
    fix = f"trainer.resume={AUTO} to go on after step {own.state.step}, or another trainer.run_dir"
    raise ConfigError([Problem("trainer.resume", resume, allowed, fix)])


def _changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield the keys that differ and that decide what the run computes."""
    before, after = dict(_leaves(saved)), dict(_leaves(now))
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key) and not _may_differ(key):
            was = f"was {before.get(key)!r} in the run that was saved"
            fix = "give the earlier value, type the new one as an override if it is meant, or trainer.resume=never"
            yield Problem(key, after.get(key), was, fix)


def _decides_on_rows(key: str) -> bool:
    """Whether another value of a key may be why other rows are trained on, or other tokens of them."""
    return key.startswith(("data.", "model.")) or ".model." in key


def _changed_rows(state: TrainerState, values: Mapping[str, Any], data: str) -> Iterator[Problem]:
    """Yield a problem where files have other rows than when the run was saved."""
    if state.data != data:
        was = f"has {data}, and had {state.data} in the run that was saved"
        fix = "give the earlier files, type data.train_files as an override if it is meant, or trainer.resume=never"
        yield Problem("data.train_files", values["data"]["train_files"], was, fix)


def _may_differ(key: str) -> bool:
    if any(part in key for part in _BUT_NOT):
        return False
    return key.startswith(_MAY_DIFFER) or any(part in key for part in _PARTS_THAT_MAY_DIFFER)


def _is_typed(key: str, overrides: Sequence[str]) -> bool:
    """Whether an override names a key, or a section that it is in."""
    typed = [override.lstrip("+~").partition("=")[0] for override in overrides]
    return any(key == name or key.startswith(f"{name}.") for name in typed)


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
