"""What a user gets wrong on the command line or in a file: one clear error, before anything starts."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megarl.data.verbs import train_problems
from tests.launch import Finished, python, run, torchrun
from tests.tiny_task import NUM_RANKS, write_weights

COMMAND = ("-m", "megarl.main_ppo", "--config-dir=.", "--config-name=rl")
MODEL, RANKS = "actor_rollout_ref.model", "trainer.n_gpus_per_node"
ROWS_PER_GROUP = 4


@dataclass(frozen=True)
class Mistake:
    """Overrides, and what the error says in the order in which it says it."""

    overrides: tuple[str, ...]
    says: tuple[str, ...]
    code: int = 2


FIRST_STAGE = "1 of 3: reading the tokenizer and the prompts\n"
FOUND_WHILE_READING = {
    *("no weights", "truncated weights"),
    *("a null prompt", "an empty prompt", "a prompt that is too long"),
}
MISTAKES = {
    "an unknown key": Mistake(
        ("data.train_bach_size=8",), ("ConfigError", "data.train_bach_size", "did you mean 'train_batch_size'?")
    ),
    "an unknown experiment": Mistake(
        ("+experiment=quikstart",), ("experiment = 'quikstart'", "no such file", "did you mean 'quickstart'?")
    ),
    "groups of one": Mistake(
        ("actor_rollout_ref.rollout.n=1", "actor_rollout_ref.actor.ppo_mini_batch_size=8"),
        ("ConfigError", "actor_rollout_ref.rollout.n = 1", "at least 2"),
    ),
    "axes that don't divide the ranks": Mistake(
        (f"{RANKS}=3",), ("ConfigError", "tensor_model_parallel_size = 2", "must divide the 3 ranks", f"fix: {RANKS}=2")
    ),
    "no config.json": Mistake((f"{MODEL}.path=no_config",), ("ModelFolderError", "no_config", "no config.json")),
    "an unknown architecture": Mistake(
        (f"{MODEL}.path=gpt2",), ("ModelFolderError", "'GPT2LMHeadModel' is not supported", "Qwen3ForCausalLM")
    ),
    "no weights": Mistake(
        (f"{MODEL}.init=pretrained",), ("ModelFolderError", "model.safetensors", "model.init=random")
    ),
    "truncated weights": Mistake(
        (f"{MODEL}.init=pretrained", f"{MODEL}.path=truncated"),
        ("ModelFolderError", "truncated/model.safetensors is truncated", "download it again"),
    ),
    "no prompt column": Mistake(
        ("data.train_files=[sft.parquet]",), ("DataError", "sft.parquet has no column 'prompt'", "messages")
    ),
    "a null prompt": Mistake(
        ("data.train_files=[train.parquet,null.parquet]",), ("DataError", "null.parquet, row group 1, row 5", "prompt")
    ),
    "an empty prompt": Mistake(
        ("data.val_files=[empty.parquet]",), ("DataError", "empty.parquet, row group 1, row 6", "prompt")
    ),
    "a truncated file": Mistake(
        ("data.train_files=[truncated.parquet]",), ("DataError", "truncated.parquet can't be read", "fix:")
    ),
    "a prompt that is too long": Mistake(
        ("data.overlong_prompts=error", "data.max_prompt_length=4"),
        ("DataError", "train.parquet, row group 0, row 0", "data.max_prompt_length = 4", "fix:"),
    ),
    "a reward file that isn't there": Mistake(
        ("reward.path=nowhere.py",), ("ConfigError", "reward.path = 'nowhere.py'", "fix:")
    ),
}


def write_bad_files(folder: Path) -> None:
    """Write what the mistakes name beside the tiny task's own files."""
    (folder / "no_config").mkdir()
    _copy_model(folder, "gpt2", architectures=["GPT2LMHeadModel"])
    truncated = _copy_model(folder, "truncated")
    write_weights(truncated)
    _truncate(truncated / "model.safetensors")
    _write_rows(folder / "null.parquet", 5, lambda row: row | {"prompt": None})
    _write_rows(folder / "empty.parquet", 6, lambda row: row | {"prompt": []})
    shutil.copyfile(folder / "train.parquet", folder / "truncated.parquet")
    _truncate(folder / "truncated.parquet")


def _copy_model(folder: Path, name: str, **fields: Any) -> Path:
    copy = Path(shutil.copytree(folder / "model", folder / name))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | fields))
    return copy


def _write_rows(path: Path, index: int, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    rows = [problem.prompt_row("train", i) for i, problem in enumerate(train_problems(0)[:8])]
    rows[index] = change(rows[index])
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=ROWS_PER_GROUP)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# One of each stage at which they are found; tests/unit/test_mistakes.py has the others of the config.
QUICK = ("an unknown key", "axes that don't divide the ranks", "no config.json", "truncated weights", "a null prompt")


@pytest.fixture(scope="module")
def outcomes(tiny_task: Path) -> Callable[[str], Finished]:
    """Return what gives the end of a command with a mistake. Those of a kind are made together, two at a time."""
    write_bad_files(tiny_task)

    @cache
    def make(is_quick: bool) -> dict[str, Finished]:
        with ThreadPoolExecutor(2) as pool:
            runs = {
                name: pool.submit(run, python(*COMMAND, *mistake.overrides), tiny_task)
                for name, mistake in MISTAKES.items()
                if (name in QUICK) == is_quick
            }
            return {name: running.result() for name, running in runs.items()}

    return lambda name: make(name in QUICK)[name]


EVERY = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in MISTAKES]
)


@EVERY
def test_a_mistake_is_one_error_that_says_what_where_and_how_to_fix_it(
    outcomes: Callable[[str], Finished], name: str
) -> None:
    finished, mistake = outcomes(name), MISTAKES[name]
    assert finished.code == mistake.code, finished.output
    assert re.search(".*".join(map(re.escape, mistake.says)), finished.stderr, re.DOTALL), finished.stderr
    assert "Traceback" not in finished.stderr


@EVERY
def test_a_mistake_is_found_before_anything_starts(
    outcomes: Callable[[str], Finished], tiny_task: Path, name: str
) -> None:
    assert outcomes(name).stdout == (FIRST_STAGE if name in FOUND_WHILE_READING else "")
    assert not (tiny_task / "run").exists(), "a folder in the way of the next try"


def test_an_error_in_the_config_costs_no_import_of_torch_or_ray(tiny_task: Path) -> None:
    overrides = MISTAKES["axes that don't divide the ranks"].overrides
    finished = run(python("-X", "importtime", *COMMAND, *overrides), tiny_task)
    imported = {line.rpartition("|")[2].strip() for line in finished.stderr.splitlines() if "import time:" in line}
    assert "megarl.checks.rules" in imported
    assert not imported & {"torch", "ray", "transformers", "vllm"}


def test_torchrun_with_another_number_of_ranks_is_an_error_that_names_both(tiny_task: Path) -> None:
    finished = run(torchrun(1, *COMMAND), tiny_task)
    assert finished.code == 1
    error, _, _ = finished.stderr.partition("Traceback")  # torchrun's own report of a rank's exit code
    assert f"torchrun started 1 ranks, the config says {NUM_RANKS}" in error
