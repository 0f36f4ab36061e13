"""The engine answers as the trainer's weights would: after each publish, token for token as a vLLM started on them.

Four ranks train TP2 x PP2 with a KL reference, and host two vLLM replicas of TP2. A plain vLLM of TP1 reads what the
run exported.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.recorded_ppo import RECORDED_TO
from tests.launch import python, run, torchrun
from tests.tiny_task import write_experts, write_tiny_task, write_weights

REPOSITORY = Path(__file__).parents[2]
NUM_RANKS, NUM_STEPS = 4, 2
OVERRIDES = (
    "trainer.n_gpus_per_node=4",
    "actor_rollout_ref.actor.megatron.pipeline_model_parallel_size=2",
    "actor_rollout_ref.actor.optim.lr=0.002",
    "actor_rollout_ref.model.init=pretrained",
    f"trainer.total_training_steps={NUM_STEPS}",
    "trainer.test_freq=1",
    "trainer.save_freq=1",
)
pytestmark = pytest.mark.long  # tests/dist compares engines with Hugging Face each time

Answers = list[list[int]]


@dataclass(frozen=True)
class Published:
    """The validation after a publish. by_replica: what each replica answered. plain: what plain vLLM did."""

    versions: list[int]
    by_replica: list[Answers]
    plain: Answers


@pytest.fixture(scope="module")
def published(tiny_task: Path) -> list[Published]:
    """Run two steps, then ask plain vLLM the validation prompts with the weights of each publish."""
    write_weights(tiny_task / "model")
    return _published(tiny_task, "publish")


def _published(tiny_task: Path, name: str, *overrides: str) -> list[Published]:
    question = tiny_task / "question.json"
    validations = _validations(tiny_task, f"trainer.run_dir=runs/{name}", *overrides)
    question.write_text(json.dumps(validations[0]))
    checkpoints = tiny_task / "runs" / name / "checkpoints"
    folders = [tiny_task / "model", checkpoints / "step_1", checkpoints / "final"]
    command = python("-m", "tests.e2e.plain_vllm", str(question), *map(str, folders))
    alone = run(command, tiny_task, python_path=REPOSITORY)
    assert alone.code == 0, alone.output
    plain = [json.loads(line) for line in alone.stdout.splitlines() if line.startswith("[[")]
    return [
        Published(validation["versions"], validation["answers_by_replica"], answers)
        for validation, answers in zip(validations, plain, strict=True)
    ]


def _validations(tiny_task: Path, *overrides: str) -> list[dict[str, Any]]:
    recorded = tiny_task / "recorded.json"
    command = ("-m", "tests.e2e.recorded_ppo", "--config-dir=.", "--config-name=rl", *OVERRIDES, *overrides)
    environ = {RECORDED_TO: str(recorded)}
    finished = run(torchrun(NUM_RANKS, *command), tiny_task, python_path=REPOSITORY, environ=environ)
    assert finished.code == 0, finished.output
    _check_of_the_first_publish, *validations = json.loads(recorded.read_text())
    assert len(validations) == NUM_STEPS + 1
    return validations


@pytest.mark.parametrize("step", range(NUM_STEPS + 1))
def test_greedy_tokens_are_those_of_a_vllm_started_on_the_exported_weights(
    published: list[Published], step: int
) -> None:
    assert published[step].by_replica[0] == published[step].plain


@pytest.mark.parametrize("step", range(NUM_STEPS + 1))
def test_both_replicas_agree(published: list[Published], step: int) -> None:
    assert published[step].by_replica == [published[step].by_replica[0]] * 2


def test_every_rollout_carries_the_number_of_the_publish(published: list[Published]) -> None:
    assert [validation.versions for validation in published] == [[0], [1], [2]]


def test_each_step_changes_what_is_answered(published: list[Published]) -> None:
    before, after_one, after_two = (validation.plain for validation in published)
    assert before != after_one != after_two


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_engines_in_processes_of_their_own_answer_as_a_vllm_started_on_the_exported_weights(
    tmp_path: Path, kind: str, tp: int
) -> None:
    write_tiny_task(tmp_path)
    if kind == "experts":
        write_experts(tmp_path / "model")
    write_weights(tmp_path / "model")
    rollout = "actor_rollout_ref.rollout"
    placed = (f"{rollout}.placement=server", f"{rollout}.tensor_model_parallel_size={tp}")
    validations = _published(tmp_path, "served", *placed)
    assert [validation.versions for validation in validations] == [[0], [1], [2]]
    for validation in validations:
        assert validation.by_replica == [validation.plain]
    assert validations[0].plain != validations[1].plain != validations[2].plain
