"""A whole run of main_sft over two pipeline stages."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.launch import Finished, python, run, torchrun
from tests.tiny_task import NUM_RANKS

NUM_STEPS = 30


COMMAND = ("-m", "megarl.main_sft", "--config-dir=.", "--config-name=sft")
# As `srun` does with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set: a process a rank, and no torchrun.
ONE_BY_ONE = """
export WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=$1; shift
RANK=1 SLURM_LOCALID=1 "$@" & other=$!
RANK=0 SLURM_LOCALID=0 "$@" || exit 1
wait $other
"""


@pytest.fixture(scope="module")
def finished(tiny_task: Path) -> Finished:
    """Run the recipe."""
    return run(torchrun(NUM_RANKS, *COMMAND, "trainer.run_dir=runs/sft"), tiny_task)


def test_the_loss_falls(finished: Finished, tiny_task: Path) -> None:
    assert finished.code == 0, finished.output
    lines = [json.loads(line) for line in (tiny_task / "runs/sft/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss/train"] for line in lines]
    assert len(losses) == NUM_STEPS
    assert losses[-1] < 0.5 * losses[0]
    assert lines[-1]["loss/val"] < 0.5 * losses[0]


def test_the_last_lines_name_the_loss_and_a_model_that_loads(finished: Finished, tiny_task: Path) -> None:
    measure, loss, _, model = finished.stdout.splitlines()[-4:]
    folder = tiny_task / "runs/sft/checkpoints/final"
    assert measure.startswith("validation loss over ")
    assert loss.strip().startswith(f"after {NUM_STEPS} steps: ")
    assert model == f"model: {folder}"
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 2


def test_nothing_is_left_running(finished: Finished) -> None:
    assert finished.processes == ()


def test_ranks_that_are_started_one_by_one_are_one_run_with_the_same_numbers(
    finished: Finished, tiny_task: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = python(*COMMAND, "trainer.run_dir=runs/one_by_one")
    one_by_one = run(["bash", "-c", ONE_BY_ONE, "bash", port, *command], tiny_task)
    assert one_by_one.code == 0, one_by_one.output
    assert one_by_one.stdout.count("run folder: ") == finished.stdout.count("run folder: ")
    lines = [(tiny_task / "runs" / name / "metrics.jsonl").read_text().splitlines() for name in ("sft", "one_by_one")]
    losses, same = ([json.loads(line)["loss/train"] for line in text] for text in lines)
    assert losses == same and one_by_one.processes == ()
