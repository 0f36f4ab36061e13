"""A plan reads what a run reads of data and reward files, and says what isn't here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megarl.checks.run import CheckedRun, check_ppo, check_sft
from megarl.config.schema import PPOConfig
from megarl.errors import ConfigError, MegarlError
from megarl.reward.source import check_reward_file
from tests.unit.composed_configs import composed_values

MODEL, REWARD = "actor_rollout_ref.model.path", "def compute_score(**row):\n    return 0.0\n"


def _row(**changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "data_source": "gsm8k",
        "prompt": [{"role": "user", "content": "1 + 1?"}],
        "reward_model": {"ground_truth": "2"},
    }
    return row | changes


def _write(file: Path, *rows: dict[str, Any]) -> str:
    pq.write_table(pa.Table.from_pylist([*rows]), file)
    return str(file)


def _planned(folder: Path, *rows: dict[str, Any], **changes: object) -> CheckedRun[PPOConfig]:
    """Check a plan of a run on four sound rows and ``rows``, which follow them."""
    train = _write(folder / "train.parquet", *[_row()] * 4, *rows)
    values: dict[str, object] = {
        MODEL: "Qwen/Qwen3-8B",
        "data.train_files": [train],
        "data.val_files": [_write(folder / "test.parquet", _row())],
        "data.train_batch_size": 4,
        "actor_rollout_ref.actor.ppo_mini_batch_size": 16,
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 2,
        "actor_rollout_ref.rollout.n": 4,
        "algorithm.adv_estimator": "grpo",
        **changes,
    }
    return check_ppo(composed_values("ppo_megatron_trainer", **values), files_may_be_missing=True)


def test_sound_rows_leave_nothing_but_the_model_unchecked(tmp_path: Path) -> None:
    checked = _planned(tmp_path)
    assert (checked.num_rows, checked.num_steps) == (4, 30)
    [note] = checked.notes
    assert note.startswith(f"{MODEL}: Qwen/Qwen3-8B isn't on this machine")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (_row(data_source="gsm9k"), "'gsm9k': no such reward function"),
        (_row(reward_model={"ground_truth": "two"}), "train.parquet:4: reward_model.ground_truth = 'two'"),
        (_row(prompt=[]), "train.parquet, row group 0, row 4: prompt is an empty list"),
        (_row(data_source=""), "row 4: data_source is ''"),
    ],
)
def test_a_row_that_a_run_would_refuse_is_refused_by_the_plan(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    with pytest.raises(MegarlError) as caught:
        _planned(tmp_path, row)
    assert said in str(caught.value)


def test_rows_of_a_reward_of_ones_own_may_have_any_source_and_ground_truth(tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text(REWARD)
    row = _row(data_source="mine", reward_model={"ground_truth": "two"})
    notes = _planned(tmp_path, row, **{"reward.path": str(tmp_path / "r.py")}).notes
    assert any(note.startswith(f"reward.path: {tmp_path / 'r.py'} is read and not run") for note in notes)
    (tmp_path / "r.py").write_text(REWARD.replace("compute_score", "score"))
    with pytest.raises(MegarlError, match=r"has no such function\. it has: score"):
        _planned(tmp_path, row, **{"reward.path": str(tmp_path / "r.py")})


@pytest.mark.parametrize("key", ["data.train_files", "data.val_files"])
def test_a_file_without_rows_is_an_error_of_plan_and_run(tmp_path: Path, key: str) -> None:
    file = tmp_path / "none.parquet"
    pq.write_table(pa.Table.from_pylist([_row()]).slice(0, 0), file)
    with pytest.raises(ConfigError) as caught:
        _planned(tmp_path, **{key: [str(file)]})
    assert [(p.key, p.value, p.allowed) for p in caught.value.problems] == [(key, str(file), "has no rows")]
    sft = {"model.path": "Qwen/Qwen3-8B", "data.train_files": [str(file)], "data.messages_key": "prompt"}
    with pytest.raises(ConfigError, match="has no rows"):
        check_sft(composed_values("sft_trainer", **sft), files_may_be_missing=True)


def test_what_is_not_here_is_noted_by_its_key(tmp_path: Path) -> None:
    gone = str(tmp_path / "gone.parquet")
    checked = _planned(tmp_path, **{"data.train_files": [gone], "algorithm.path": __file__})
    assert checked.num_rows is None and checked.num_steps is None
    starts = [note.partition(":")[0] for note in checked.notes]
    assert starts == [MODEL, "data.train_files", "algorithm.path"]
    assert f"data.train_files: {gone} isn't on this machine: its rows and columns are unread" in checked.notes


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def compute_score(:\n", "the file is no Python"),
        ("async def compute_score(**row):\n    return 1.0\n", "it is an async function"),
        ("def compute_score(**row):\n    yield 1.0\n", "it is a generator function"),
        ("class compute_score:\n    pass\n", "it is a class"),
        ("def compute_scor(**row):\n    return 1.0\n", "it has: compute_scor. did you mean 'compute_scor'?"),
        ("", "it has: none"),
    ],
)
def test_a_reward_file_that_can_not_score_is_refused_unrun(tmp_path: Path, source: str, said: str) -> None:
    (tmp_path / "r.py").write_text(source)
    with pytest.raises(MegarlError) as caught:
        check_reward_file(str(tmp_path / "r.py"), "compute_score")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "raise SystemExit(1)\n" + REWARD,
        "from mine import compute_score\n",
        "from mine import *\n",
        "compute_score = lambda **row: 1.0\n",
        "if True:\n    def compute_score(**row):\n        return 1.0\n",
        "def compute_score(**row):\n    def parts():\n        yield 1\n    return sum(parts())\n",
        "import functools\n\n\n@functools.cache\nasync def compute_score(**row):\n    return 1.0\n",
    ],
)
def test_a_function_that_may_be_there_in_another_way_passes_and_nothing_runs(tmp_path: Path, source: str) -> None:
    (tmp_path / "r.py").write_text(source)
    check_reward_file(str(tmp_path / "r.py"), "compute_score")
