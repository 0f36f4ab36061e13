"""A whole run of main_ppo with every kind of process in it, on Ray and under torchrun."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from megarl.monitor.trace import overlap_share, read_spans, training_s
from tests.forked import Ended, run_forked
from tests.launch import Finished, python, run, shared_memory, torchrun
from tests.tiny_task import NUM_RANKS, NUM_TEST

NUM_STEPS = 3
# Far above the rounding errors of gradients, which Adam would blow up where a gradient is next to zero.
EPS = "actor_rollout_ref.actor.optim.eps=1e-5"
COMMAND = ("-m", "megarl.main_ppo", "--config-dir=.", "--config-name=rl", "trainer.seed=1", EPS)
SERVED = (
    "actor_rollout_ref.rollout.placement=server",
    "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
    "trainer.logger=[console,tensorboard,trace]",
)
KILLS = Path(__file__).parents[1] / "fault" / "kills"
# Of seven tokens and one more step a generation, in that of the second training step.
KILLED = "0:megarl.rollout.vllm_stream:VllmStream.step:25:before"


@dataclass(frozen=True)
class Done:
    """A finished run, its folder, and the shared memory that it left."""

    finished: Finished | Ended
    folder: Path
    left: set[str]

    def metrics(self) -> list[dict[str, Any]]:
        """Return the metrics of each step, without what depends on the clock."""
        return metrics(self.folder)

    def lines(self) -> list[dict[str, Any]]:
        """Return all lines of metrics.jsonl."""
        return lines(self.folder)


@pytest.fixture(scope="module")
def runs(tiny_task: Path) -> Callable[[str], Done]:
    """Return what runs the same recipe under a launcher, or with an engine of its own that is killed, once each."""
    kill = {"MEGARL_TEST_KILL": KILLED, "MEGARL_TEST_STRUCK": str(tiny_task / "struck"), "PYTHONPATH": str(KILLS)}

    @cache
    def run_once(name: str) -> Done:
        before, to = shared_memory(), f"trainer.run_dir=runs/{name}"
        finished: Finished | Ended
        if name == "served":
            finished = run_forked("run", [*COMMAND, *SERVED, to], tiny_task, num_ranks=NUM_RANKS, environ=kill)
        else:
            command = python(*COMMAND) if name == "ray" else torchrun(NUM_RANKS, *COMMAND)
            finished = run([*command, to], tiny_task)
        assert finished.code == 0, finished.output
        return Done(finished, tiny_task / "runs" / name, shared_memory() - before)

    return run_once


@pytest.fixture(scope="module")
def on_fsdp(tiny_task: Path) -> list[dict[str, Any]]:
    """Return the metrics of the same recipe on the other backend."""
    command = [argument.replace("=rl", "=rl_fsdp") for argument in COMMAND]
    ended = run_forked("run", [*command, "trainer.run_dir=runs/fsdp"], tiny_task, num_ranks=NUM_RANKS)
    assert ended.code == 0, ended.output
    return metrics(tiny_task / "runs" / "fsdp")


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the metrics of each step, without what depends on the clock."""
    return [{k: v for k, v in line.items() if not k.startswith(("time_s", "wall_time"))} for line in lines(folder)[1:]]


def lines(folder: Path) -> list[dict[str, Any]]:
    """Return all lines of metrics.jsonl: the first is of the validation before training."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# Under torchrun tests/e2e/test_sft_run.py runs each time.
LAUNCHERS = pytest.mark.parametrize("launcher", ["ray", pytest.param("torchrun", marks=pytest.mark.long)])


@pytest.mark.long
def test_ray_and_torchrun_compute_the_same_numbers(runs: Callable[[str], Done]) -> None:
    on_ray, under_torchrun = (runs(name).metrics() for name in ("ray", "torchrun"))
    assert [line["step"] for line in on_ray] == list(range(1, NUM_STEPS + 1))
    assert on_ray == under_torchrun


def test_fsdp_computes_the_same_numbers_as_megatron(runs: Callable[[str], Done], on_fsdp: list[dict[str, Any]]) -> None:
    """A fresh model samples padding tokens as well, whose gradient transformers' embedding would leave out."""
    for found, expected in zip(on_fsdp, runs("ray").metrics(), strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_on_fsdp_the_engine_has_the_trainers_weights_at_every_step(on_fsdp: list[dict[str, Any]]) -> None:
    assert [line["rollout/policy_version"] for line in on_fsdp] == list(range(NUM_STEPS))
    assert all(line["rollout_train/logprob_diff_max"] < 1e-4 for line in on_fsdp)


def test_an_engine_in_a_process_of_its_own_gives_the_same_rollouts_though_it_is_killed_in_the_middle(
    runs: Callable[[str], Done], tiny_task: Path
) -> None:
    finished = runs("served").finished
    assert (tiny_task / "struck").is_file()
    [note] = [line for line in finished.stdout.splitlines() if line.startswith("engine 0 is lost")]
    died, left = "engine 0 is lost: rank 0 died of signal 9 (Killed); ", "another takes its place"
    assert note.startswith(died) and re.search(r"; \d+ rollouts that it had begun are sampled again, ", note)
    assert note.endswith(left)
    for found, expected in zip(runs("served").metrics(), runs("ray").metrics(), strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    for name in ("step_1", "step_2", "step_3"):
        served, colocated = (runs(r).folder / "rollouts" / f"{name}.jsonl" for r in ("served", "ray"))
        assert served.read_text() == colocated.read_text()


def test_the_timeline_of_a_synchronous_run_has_no_overlap_and_the_engine_in_the_dead_ones_place(
    runs: Callable[[str], Done],
) -> None:
    spans = read_spans(runs("served").folder / "trace.json")
    count = Counter((span.row, span.name) for span in spans)
    assert count["controller", "step"] == count["trainer", "update_actor"] == NUM_STEPS
    assert count["engine 0", "start"] == 2 and count["engine 0", "generate"] > NUM_STEPS
    assert overlap_share(spans) == 0 and training_s(spans) > 0


def test_nothing_is_left_of_a_run_with_engines_of_its_own(runs: Callable[[str], Done]) -> None:
    assert (runs("served").finished.processes, runs("served").left) == ((), set())
    assert runs("served").finished.stderr == ""


def test_the_validations_before_training_and_at_the_end_are_in_the_metrics(runs: Callable[[str], Done]) -> None:
    before, *_, last = runs("ray").lines()
    assert before["step"] == 0 and 0 <= before["val/reward_mean"] <= 1
    assert last["step"] == NUM_STEPS and 0 <= last["val/reward_mean"] <= 1
    printed = runs("ray").finished.stdout
    assert f"before training: {before['val/reward_mean']:.3f}" in printed
    assert f"after {NUM_STEPS} steps: {last['val/reward_mean']:.3f}" in printed


def test_every_step_trains_on_rewards_that_differ(runs: Callable[[str], Done]) -> None:
    for line in runs("ray").metrics():
        assert line["reward/std"] > 0 and line["actor/grad_norm"] > 0


def test_the_engine_samples_with_the_weights_of_the_step_before(runs: Callable[[str], Done]) -> None:
    lines = runs("ray").metrics()
    assert [line["rollout/policy_version"] for line in lines] == list(range(NUM_STEPS))
    assert max(line["rollout_train/logprob_diff_max"] for line in lines) < 1e-4


@LAUNCHERS
def test_the_run_folder_is_complete(runs: Callable[[str], Done], launcher: str) -> None:
    folder = runs(launcher).folder
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["trainer"]["seed"] == 1 and config["data"]["train_files"] == ["train.parquet"]
    overrides = yaml.safe_load((folder / "overrides.yaml").read_text())
    assert overrides == [
        "trainer.seed=1",
        "actor_rollout_ref.actor.optim.eps=1e-5",
        f"trainer.run_dir=runs/{launcher}",
    ]
    assert "8 x 4 = 32 rollouts" in (folder / "plan.txt").read_text()
    assert "torch: " in (folder / "environment.txt").read_text()
    assert list((folder / "tensorboard").iterdir())
    validated = [line["step"] for line in runs(launcher).lines() if "val/reward_mean" in line]
    names = {*(f"step_{s}.jsonl" for s in (1, 2, 3)), *(f"val_step_{s}.jsonl" for s in validated)}
    assert {path.name for path in (folder / "rollouts").iterdir()} == names
    first, header, *_ = (folder / "console.log").read_text().splitlines()
    assert first.startswith("3 of 3: starting ") and header.split()[0] == "step"
    assert (folder / "report.txt").read_text().splitlines()[-1] == f"model: {folder / 'checkpoints' / 'final'}"


@LAUNCHERS
def test_the_final_checkpoint_is_a_hugging_face_model(runs: Callable[[str], Done], launcher: str) -> None:
    folder = runs(launcher).folder / "checkpoints" / "final"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    [logits_SV] = model(torch.tensor([tokenizer("Tom has 3 eggs")["input_ids"]])).logits
    assert logits_SV.shape[-1] == len(tokenizer) and torch.isfinite(logits_SV).all()


@LAUNCHERS
def test_the_output_ends_with_the_report_of_before_and_after(runs: Callable[[str], Done], launcher: str) -> None:
    done = runs(launcher)
    tail = [line.strip() for line in done.finished.stdout.splitlines()[-5:]]
    assert tail[0] == f"validation reward over {NUM_TEST} rollouts"
    assert tail[1].startswith("before training: 0.") and tail[2].startswith(f"after {NUM_STEPS} steps: 0.")
    assert tail[3:] == [f"run folder: {done.folder}", f"model: {done.folder / 'checkpoints' / 'final'}"]


@LAUNCHERS
def test_a_newcomer_reads_nothing_but_the_run(runs: Callable[[str], Done], launcher: str) -> None:
    finished = runs(launcher).finished
    steps = [found[1] for line in finished.stdout.splitlines() if (found := re.match(r" {5}(\d) ", line))]
    assert steps == ["0", "1", "2", "3"]
    assert finished.stderr == ""


@LAUNCHERS
def test_nothing_is_left_of_the_run(runs: Callable[[str], Done], launcher: str) -> None:
    assert (runs(launcher).finished.processes, runs(launcher).left) == ((), set())
