"""A whole run of main_sft over two pipeline stages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.launch import Finished, run, torchrun
from tests.tiny_task import NUM_RANKS

NUM_STEPS = 30


@pytest.fixture(scope="module")
def finished(tiny_task: Path) -> Finished:
    """Run the recipe."""
    command = ("-m", "megarl.main_sft", "--config-dir=.", "--config-name=sft", "trainer.run_dir=runs/sft")
    return run(torchrun(NUM_RANKS, *command), tiny_task)


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
