"""Experts that are split one way in the trainer and another in vLLM arrive: greedy answers are Hugging Face's."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest

from megarl.parallel.layout import EngineLayout, Layout
from tests.dist.hf_training import greedy_answers
from tests.dist.publish_case import GREEDY, PROMPTS
from tests.dist.ranks import run_case
from tests.dist.tiny_models import save_tiny_model

# The model, and how trainer and engine split it.
JOBS = {
    "qwen3_moe": ("qwen3_moe-untied", Layout(2, tp=2, sequence_parallel=True, ep=2, etp=1), EngineLayout(2)),
    "qwen3_moe_spread": ("qwen3_moe-untied", Layout(2, tp=2, sequence_parallel=True), EngineLayout(2, ep=2)),
    "mixtral": ("mixtral-untied", Layout(2, ep=2), EngineLayout(2)),
    "mixtral_spread": ("mixtral-untied", Layout(2), EngineLayout(2, ep=2)),
    "qwen2_moe": ("qwen2_moe-tied", Layout(2, tp=2, sequence_parallel=True), EngineLayout(2)),
    "qwen2_moe_spread": ("qwen2_moe-tied", Layout(2, tp=2, sequence_parallel=True), EngineLayout(2, ep=2)),
}
QUICK = ("qwen3_moe", "qwen3_moe_spread")
LONG = tuple(job for job in JOBS if job not in QUICK)


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return what gives the folder of a job, in which its ranks have answered."""
    answers = cache(lambda jobs: _answered({job: tmp_path_factory.mktemp(job) for job in jobs}))
    return lambda job: answers(QUICK if job in QUICK else LONG)[job]


def _answered(folders: dict[str, Path]) -> dict[str, Path]:
    """Let some jobs run at the same time."""
    for job, folder in folders.items():
        model, *layouts = JOBS[job]
        sizes = {"head_dim": 32} if model == "qwen3_moe-untied" else {"hidden_size": 128}
        save_tiny_model(model, folder, **sizes)  # heads of 32, the smallest that vLLM's attention takes on CPU
        (folder / "layouts.json").write_text(json.dumps([asdict(layout) for layout in layouts]))
    run_case("tests.dist.publish_case", *folders.values())
    return folders


@pytest.mark.parametrize("job", [*QUICK, *(pytest.param(job, marks=pytest.mark.long) for job in LONG)])
def test_greedy_answers_of_published_experts_are_hugging_faces_on_every_rank(
    answered: Callable[[str], Path], job: str
) -> None:
    folder, ranks = answered(job), range(JOBS[job][1].world_size)
    expected = greedy_answers(folder, PROMPTS, GREEDY.max_tokens)
    assert [json.loads((folder / f"rank{r}.json").read_text()) for r in ranks] == [expected for _ in ranks]
