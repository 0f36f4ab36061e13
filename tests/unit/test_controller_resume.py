"""Which checkpoint a run goes on from, and what of its configuration may differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megarl.checkpoint.folder import CheckpointFolder
from megarl.checkpoint.manifest import hashed
from megarl.checkpoint.trainer_state import FILE_NAME, TrainerState, write_trainer_state
from megarl.config.schema import SFTTrainerConfig
from megarl.controller.resume import Resumption, find_resumption, is_finished
from megarl.errors import CheckpointError, ConfigError
from megarl.train.held_state import UpdateCounts
from tests.unit.composed_configs import sft_config

DATA = "24 rows with SHA-256 0123"
CONFIG: dict[str, Any] = {
    "data": {"train_files": ["a.parquet"], "val_files": ["b.parquet"], "train_batch_size": 8},
    "actor_rollout_ref": {
        "actor": {
            "optim": {"lr": 1e-6},
            "ppo_micro_batch_size_per_gpu": 4,
            "megatron": {"tensor_model_parallel_size": 2, "override_transformer_config": {}},
        },
        "rollout": {"temperature": 1.0, "tensor_model_parallel_size": 2},
    },
    "trainer": {"seed": 0, "total_epochs": 3, "n_gpus_per_node": 8},
}


def changed(key: str, value: object) -> dict[str, Any]:
    """Return the configuration with one leaf replaced."""
    config: dict[str, Any] = json.loads(json.dumps(CONFIG))
    *path, name = key.split(".")
    section = config
    for part in path:
        section = section[part]
    section[name] = value
    return config


@pytest.fixture(scope="module")
def trainer() -> SFTTrainerConfig:
    """Return the section of a run as its defaults have it."""
    return sft_config().trainer


def save(run_dir: Path, step: int, *, updates: Mapping[str, UpdateCounts] | None = None, resume: str = "auto") -> Path:
    """Make a checkpoint of a run. resume: where the run began."""
    folder = CheckpointFolder(run_dir / "checkpoints")
    partial = folder.begin(step)
    counts = {"actor": UpdateCounts(step, step)} if updates is None else updates
    write_trainer_state(partial, TrainerState(step, step, None, counts, changed("trainer.resume", resume), data=DATA))
    return folder.commit(partial, step, [hashed(partial, FILE_NAME)], is_last=False)


def with_fields(trainer: SFTTrainerConfig, **fields: object) -> SFTTrainerConfig:
    """Return the section with some keys of other values."""
    return type(trainer)(**{**vars(trainer), **fields})


def found_in(run_dir: Path, trainer: SFTTrainerConfig, **fields: object) -> Resumption | None:
    """Return what a run of the same configuration goes on from."""
    return find_resumption(with_fields(trainer, **fields), run_dir, CONFIG, [], DATA)


def test_a_run_without_checkpoints_starts_anew(tmp_path: Path, trainer: SFTTrainerConfig) -> None:
    assert found_in(tmp_path, trainer) is None


def test_a_run_goes_on_from_its_newest_checkpoint_unless_it_never_does(
    tmp_path: Path, trainer: SFTTrainerConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (2, 10):
        save(tmp_path, step)
    found = found_in(tmp_path, trainer)
    assert found is not None and found.state.step == 10
    assert found.on_ranks.updates == {"actor": UpdateCounts(10, 10)}
    assert f"going on after step 10 from {tmp_path / 'checkpoints' / 'step_10'}" in capsys.readouterr().out
    assert found_in(tmp_path, trainer, resume="never") is None


@pytest.mark.parametrize("named", ["", "checkpoints", "checkpoints/step_2"])
def test_a_run_goes_on_from_the_checkpoint_or_the_latest_of_the_run_that_is_named(
    tmp_path: Path, trainer: SFTTrainerConfig, named: str
) -> None:
    for step in (1, 2):
        save(tmp_path / "other", step)
    found = found_in(tmp_path / "mine", trainer, resume=str(tmp_path / "other" / named))
    assert found is not None and found.folder == tmp_path / "other" / "checkpoints" / "step_2"


def test_a_run_that_began_at_another_goes_on_from_its_own_checkpoints(
    tmp_path: Path, trainer: SFTTrainerConfig
) -> None:
    other, mine = tmp_path / "other", tmp_path / "mine"
    save(other, 8)
    save(mine, 12, resume=str(other))
    found = found_in(mine, trainer, resume=str(other))
    assert found is not None and found.folder == mine / "checkpoints" / "step_12"


def test_a_run_in_whose_folder_another_has_saved_does_not_begin_at_a_checkpoint(
    tmp_path: Path, trainer: SFTTrainerConfig
) -> None:
    for step in (2, 4):
        save(tmp_path, step)
    earlier = str(tmp_path / "checkpoints" / "step_2")
    with pytest.raises(ConfigError, match=r"trainer\.resume = 'auto'\n +fix: trainer\.resume=auto .* after step 4"):
        found_in(tmp_path, trainer, resume=earlier)


def test_metrics_of_steps_that_are_taken_again_are_forgotten(tmp_path: Path, trainer: SFTTrainerConfig) -> None:
    save(tmp_path, 2)
    lines = [json.dumps({"step": step}) + "\n" for step in range(5)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 5, "los')
    assert found_in(tmp_path, trainer) is not None
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines[:3])


def test_a_damaged_checkpoint_ends_the_run_or_is_set_aside(
    tmp_path: Path, trainer: SFTTrainerConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (2, 4):
        path = save(tmp_path, step)
    (path / FILE_NAME).write_text("{}")
    with pytest.raises(CheckpointError, match=r"step_4 isn't as it was saved: .*resume_from_older=true"):
        found_in(tmp_path, trainer)
    found = found_in(tmp_path, trainer, resume_from_older=True)
    assert found is not None and found.state.step == 2
    assert "DAMAGED" in capsys.readouterr().out
    assert CheckpointFolder(tmp_path / "checkpoints").steps() == [2]
    assert (tmp_path / "checkpoints" / "step_4.damaged").is_dir()


def test_what_a_save_that_was_broken_off_left_is_removed(tmp_path: Path, trainer: SFTTrainerConfig) -> None:
    save(tmp_path, 2)
    CheckpointFolder(tmp_path / "checkpoints").begin(4)
    assert found_in(tmp_path, trainer) is not None
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_a_checkpoint_without_state_is_nothing_to_go_on_from(tmp_path: Path, trainer: SFTTrainerConfig) -> None:
    save(tmp_path, 2, updates={})
    with pytest.raises(CheckpointError, match="no state to go on from"):
        found_in(tmp_path, trainer)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("trainer.total_epochs", 9),
        ("trainer.n_gpus_per_node", 4),
        ("data.val_files", []),
        ("actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu", 1),
        ("actor_rollout_ref.actor.megatron.tensor_model_parallel_size", 1),
        ("actor_rollout_ref.rollout.tensor_model_parallel_size", 1),
    ],
)
def test_what_does_not_change_the_run_may_differ(
    tmp_path: Path, trainer: SFTTrainerConfig, key: str, value: object
) -> None:
    save(tmp_path, 2)
    assert find_resumption(trainer, tmp_path, changed(key, value), [], DATA) is not None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("trainer.seed", 1),
        ("data.train_files", ["other.parquet"]),
        ("data.train_batch_size", 16),
        ("actor_rollout_ref.actor.optim.lr", 2e-6),
        ("actor_rollout_ref.rollout.temperature", 0.6),
        ("actor_rollout_ref.actor.megatron.override_transformer_config", {"moe_z_loss_coeff": 0.1}),
    ],
)
def test_what_changes_the_run_unseen_is_an_error_and_told_where_it_was_typed(
    tmp_path: Path, trainer: SFTTrainerConfig, capsys: pytest.CaptureFixture[str], key: str, value: object
) -> None:
    save(tmp_path, 2)
    with pytest.raises(ConfigError) as error:
        find_resumption(trainer, tmp_path, changed(key, value), ["trainer.total_epochs=9"], DATA)
    assert key in str(error.value) and "in the run that was saved" in str(error.value)
    assert find_resumption(trainer, tmp_path, changed(key, value), [f"{key}={value}"], DATA) is not None
    assert f"  {key}" in capsys.readouterr().out


def test_files_with_other_rows_change_the_run_unseen(
    tmp_path: Path, trainer: SFTTrainerConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 2)
    other = DATA.replace("24", "25")
    with pytest.raises(ConfigError, match=r"data\.train_files = .*: has 25 rows with .*, and had 24 rows with"):
        find_resumption(trainer, tmp_path, CONFIG, [], other)
    assert find_resumption(trainer, tmp_path, CONFIG, ["data.train_files=[a.parquet]"], other) is not None
    assert "  data.train_files" in capsys.readouterr().out
    batch_size = changed("data.train_batch_size", 16), ["data.train_batch_size=16"]
    assert find_resumption(trainer, tmp_path, *batch_size, other) is not None


def test_a_run_that_has_all_its_steps_is_finished(
    tmp_path: Path, trainer: SFTTrainerConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 4)
    found = found_in(tmp_path, trainer)
    assert not is_finished(None, 4, tmp_path) and not is_finished(found, 5, tmp_path)
    final = tmp_path / "checkpoints" / "final"
    assert not final.exists()
    assert is_finished(found, 4, tmp_path)
    assert final.resolve() == tmp_path / "checkpoints" / "step_4"
    assert "all 4 steps are done" in capsys.readouterr().out
