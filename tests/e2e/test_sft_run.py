"""A whole run of main_sft over two pipeline stages."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megarl.checkpoints import main as checkpoints
from megarl.export import main as export
from tests.launch import Finished, python, run, torchrun
from tests.tiny_task import NUM_RANKS

NUM_STEPS = 30
STEP_10 = "runs/sft/checkpoints/step_10"

# Far above the rounding errors of gradients, which Adam would blow up where a gradient is next to zero.
EPS = "optim.eps=1e-5"
COMMAND = ("-m", "megarl.main_sft", "--config-dir=.", "--config-name=sft", EPS)
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
    return run(torchrun(NUM_RANKS, *COMMAND, "trainer.run_dir=runs/sft", "trainer.save_freq=10"), tiny_task)


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


@pytest.mark.long  # tests/dist compares losses and gradients of both backends with Hugging Face each time
def test_fsdp_computes_the_same_losses_and_weights_as_megatron(finished: Finished, tiny_task: Path) -> None:
    """Every loss of ten steps, and what is saved after them."""
    on_fsdp = ("strategy=fsdp2", "trainer.total_training_steps=10", "trainer.run_dir=runs/fsdp")
    on_two_shards = run(torchrun(NUM_RANKS, *COMMAND, *on_fsdp), tiny_task)
    assert on_two_shards.code == 0, on_two_shards.output
    found, expected = (_losses(tiny_task / "runs" / name)[:10] for name in ("fsdp", "sft"))
    assert len(found) == 10 and found == pytest.approx(expected, rel=1e-5)
    weights, saved = (load_file(tiny_task / p / "model.safetensors") for p in ("runs/fsdp/checkpoints/final", STEP_10))
    assert weights.keys() == saved.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, saved[name], rtol=0, atol=1e-5)


def _losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss/train"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_nothing_is_left_running(finished: Finished) -> None:
    assert finished.processes == ()


@pytest.mark.long
def test_ranks_that_are_started_one_by_one_are_one_run_with_the_same_numbers(
    finished: Finished, tiny_task: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = python(*COMMAND, "trainer.run_dir=runs/one_by_one")
    one_by_one = run(["bash", "-c", ONE_BY_ONE, "bash", port, *command], tiny_task)
    assert one_by_one.code == 0, one_by_one.output
    assert one_by_one.stdout.count("run folder: ") == finished.stdout.count("run folder: ")
    losses, same = (_losses(tiny_task / "runs" / name) for name in ("sft", "one_by_one"))
    assert losses == same and one_by_one.processes == ()


def _run_folder(tiny_task: Path, name: str) -> Path:
    """Return a copy of the finished run."""
    return Path(shutil.copytree(tiny_task / "runs/sft", tiny_task / "runs" / name, symlinks=True))


def test_a_user_lists_verifies_and_exports_the_checkpoints_of_a_run(finished: Finished, tiny_task: Path) -> None:
    listed = run(python("-m", "megarl.checkpoints", "runs/sft", "--verify"), tiny_task)
    assert listed.code == 0, listed.output
    assert [line.split()[1] for line in listed.stdout.splitlines()] == ["10", "20", "30"]
    assert listed.stdout.count("  actor  verified") == 3
    exported = run(python("-m", "megarl.export", "runs/sft", "--step", "10", "--out", "exports/step_10"), tiny_task)
    assert exported.code == 0, exported.output
    assert exported.stdout == "the actor after step 10: exports/step_10\n"
    weights, saved = (load_file(tiny_task / p / "model.safetensors") for p in ("exports/step_10", STEP_10))
    assert weights.keys() == saved.keys() and all(tensor.equal(saved[name]) for name, tensor in weights.items())
    assert AutoTokenizer.from_pretrained(tiny_task / "exports/step_10").chat_template


def test_an_export_is_of_the_newest_checkpoint_and_in_the_dtype_that_is_asked_for(
    finished: Finished, tiny_task: Path
) -> None:
    out = tiny_task / "half"
    assert export([str(tiny_task / "runs/sft"), "--out", str(out), "--dtype", "bfloat16"]) == 0
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    saved = load_file(tiny_task / "runs/sft/checkpoints/final/model.safetensors")
    assert model.dtype == torch.bfloat16
    state = model.state_dict()
    assert all(state[name].equal(tensor.to(torch.bfloat16)) for name, tensor in saved.items())


def test_pruning_leaves_the_newest_and_those_links(finished: Finished, tiny_task: Path) -> None:
    folder = _run_folder(tiny_task, "pruned")
    assert checkpoints([str(folder), "--keep", "1"]) == 0
    left = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert left == ["final", "latest", "step_30"]
    assert (folder / "checkpoints/latest").resolve() == (folder / "checkpoints/final").resolve()


@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [
        (export, ("runs/sft", "--step", "7", "--out", "x"), "has no step 7; it has 10, 20, 30"),
        (export, ("runs/sft", "--out", "model"), "model exists; an export never writes over another folder"),
        (export, ("runs/sft", "--out", "x", "--role", "critic"), "critic"),
        (export, ("runs/none", "--out", "x"), "has no checkpoint; give the folder of a run that saved one"),
        (export, ("runs/sft", "--out", "model/config.json/x"), "is no folder"),
        (checkpoints, ("runs/none",), "has no checkpoint; give the folder of a run that saved one"),
        (checkpoints, ("runs/sft", "--keep", "0"), "--keep 0 must be at least 1"),
        (checkpoints, ("runs/sft", "--best-by", "loss/val"), "--best-by says which stays besides those of --keep"),
    ],
)
def test_what_is_wrong_with_a_command_on_checkpoints_is_one_named_error(
    finished: Finished,
    tiny_task: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: Callable[[Sequence[str]], int],
    arguments: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.chdir(tiny_task)
    with pytest.raises(SystemExit) as ended:
        command(arguments)
    assert ended.value.code not in (0, None)
    assert said in capsys.readouterr().err
    assert not (tiny_task / "x").exists()
