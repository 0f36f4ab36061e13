"""Runs whose rewards are a model's: every rollout's is what transformers gives the same tokens, on either backend."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from tests.e2e.recorded_rewards import RECORDED_TO
from tests.forked import run_forked
from tests.tiny_task import NUM_RANKS

NUM_STEPS, COEF = 3, 0.5
JUDGE = "reward.model.path=judge"
# Axes of its own: the actor is split over tensor-parallel ranks.
ON_MEGATRON = "reward.model.megatron.tensor_model_parallel_size=1"
# By a budget of tokens; the critic starts from the reward model.
ALONE = (
    JUDGE,
    "reward.model.use_dynamic_bsz=true",
    "reward.model.forward_max_token_len_per_gpu=64",
    "reward.path=null",
    "algorithm.adv_estimator=gae",
    "critic.model={path: judge, init: pretrained}",
    "critic.optim.eps=1e-5",
    "actor_rollout_ref.actor.optim.eps=1e-5",
)
RUNS = {
    "function and model": (
        JUDGE,
        ON_MEGATRON,
        f"reward.model.coef={COEF}",
        "reward.model.megatron.pipeline_model_parallel_size=2",
        "reward.model.megatron.param_offload=true",
    ),
    # On two data-parallel ranks.
    "model alone": (*ALONE, ON_MEGATRON),
    # The actor stays on Megatron.
    "model and critic on FSDP": (*ALONE, "reward=dp_reward", "critic=dp_critic"),
}


@dataclass(frozen=True)
class Done:
    """The metrics of each step, and what was scored: before training, in each step, after it."""

    metrics: list[dict[str, Any]]
    scored: list[dict[str, Any]]
    plan: str


FIRST, *OTHERS = RUNS


@pytest.fixture(scope="module")
def done_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Done]:
    """Return what runs the tiny recipe with a reward model in one of the ways of RUNS, once each."""
    from tests.tiny_task import write_tiny_task

    @cache
    def done(name: str) -> Done:
        folder = write_tiny_task(tmp_path_factory.mktemp("judged"))
        _write_judge(folder)
        command = ("-m", "tests.e2e.recorded_rewards", "--config-dir=.", "--config-name=rl", *RUNS[name])
        environ = {RECORDED_TO: str(folder / "scored.json")}
        finished = run_forked("run", command, folder, num_ranks=NUM_RANKS, environ=environ)
        assert finished.code == 0, finished.output
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
        scored = json.loads((folder / "scored.json").read_text())
        _add_scores_of_transformers(folder / "judge", scored)
        return Done([json.loads(line) for line in lines], scored, (folder / "run" / "plan.txt").read_text())

    return done


@pytest.fixture(scope="module", params=[FIRST, *(pytest.param(name, marks=pytest.mark.long) for name in OTHERS)])
def done(request: pytest.FixtureRequest, done_of: Callable[[str], Done]) -> Done:
    """Return the run of each way."""
    return done_of(request.param)


def _write_judge(folder: Path) -> None:
    """Write a reward model of the actor's tokens, but of other sizes than the actor's."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_labels": 1, "initializer_range": 0.2}
    config = AutoConfig.from_pretrained(folder / "model", **sizes)
    torch.manual_seed(3)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "judge")
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(folder / "judge")


@torch.no_grad()
def _add_scores_of_transformers(judge: Path, scored: list[dict[str, Any]]) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(
        judge, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    model.config.pad_token_id = None  # a policy may sample that token too: the last one counts, whichever it is
    for batch in scored:
        batch["of_model"] = [float(model(torch.tensor([tokens])).logits[0, 0]) for tokens in batch["tokens"]]


def test_every_rollout_of_training_and_validation_has_the_score_that_transformers_gives_it(done: Done) -> None:
    assert len(done.scored) == NUM_STEPS + 2
    for batch in done.scored:
        coef, functions = (COEF, batch["of_function"]) if batch["of_function"] else (1.0, [0.0] * len(batch["tokens"]))
        expected = [of_function + coef * score for of_function, score in zip(functions, batch["of_model"], strict=True)]
        assert batch["scores"] == pytest.approx(expected, abs=1e-4)
        assert len({round(score, 2) for score in batch["of_model"]}) > 3, "the scores differ too little"


def test_metrics_tell_the_model_s_part_from_the_function_s(done: Done) -> None:
    assert [line["step"] for line in done.metrics] == [0, 1, 2, 3]
    for line, batch in zip(done.metrics[1:], done.scored[1:-1], strict=True):
        assert line["reward/mean"] == pytest.approx(_mean(batch["scores"]), abs=1e-5)
        assert line["reward/model_mean"] == pytest.approx(_mean(batch["of_model"]), abs=1e-4)
        assert line.get("reward/function_mean") == (
            pytest.approx(_mean(batch["of_function"]), abs=1e-5) if batch["of_function"] else None
        )
        assert line["actor/grad_norm"] > 0 and line["time_s/score_reward_model"] > 0


def test_the_plan_knows_the_reward_model(done: Done) -> None:
    assert any(f"reward_model: {axis} 2 on 2 ranks" in done.plan for axis in ("PP", "DP"))


@pytest.mark.long
def test_a_reward_model_and_a_critic_on_fsdp_beside_an_actor_on_megatron_change_no_number(
    done_of: Callable[[str], Done],
) -> None:
    on_megatron, on_both = (done_of(name) for name in ("model alone", "model and critic on FSDP"))
    for found, expected in zip(on_both.metrics, on_megatron.metrics, strict=True):
        assert _without_times(found) == pytest.approx(_without_times(expected), rel=1e-5, abs=1e-5)
        assert found["step"] == 0 or found["critic/grad_norm"] > 0
    for of_both, of_megatron in zip(on_both.scored, on_megatron.scored, strict=True):
        assert of_both["tokens"] == of_megatron["tokens"]


def _without_times(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if not name.startswith(("time_s", "wall_time"))}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
