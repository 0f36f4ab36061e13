"""Experts that are split one way in the trainer and another in vLLM arrive: greedy answers are Hugging Face's."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest

from megarl.parallel.layout import Layout
from tests.dist.hf_training import greedy_answers
from tests.dist.publish_case import GREEDY, PROMPTS
from tests.dist.ranks import run_case
from tests.dist.tiny_models import save_tiny_model

JOBS = {
    "qwen3_moe-untied": Layout(2, tp=2, sequence_parallel=True, ep=2, etp=1),
    "mixtral-untied": Layout(2, ep=2),
    "qwen2_moe-tied": Layout(2, tp=2, sequence_parallel=True),
}

QUICK, LONG = ("qwen3_moe-untied",), ("mixtral-untied", "qwen2_moe-tied")


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return what gives the folder of a model, in which the ranks of its job have answered."""
    answers = cache(lambda models: _answered({model: tmp_path_factory.mktemp(model) for model in models}))
    return lambda model: answers(QUICK if model in QUICK else LONG)[model]


def _answered(folders: dict[str, Path]) -> dict[str, Path]:
    """Let the jobs of some models run at the same time."""
    for model, folder in folders.items():
        sizes = {"head_dim": 32} if model == "qwen3_moe-untied" else {"hidden_size": 128}
        save_tiny_model(model, folder, **sizes)  # heads of 32, the smallest that vLLM's attention takes on CPU
        (folder / "layout.json").write_text(json.dumps(asdict(JOBS[model])))
    run_case("tests.dist.publish_case", *folders.values())
    return folders


@pytest.mark.parametrize("model", [*QUICK, *(pytest.param(model, marks=pytest.mark.long) for model in LONG)])
def test_greedy_answers_of_published_experts_are_hugging_faces_on_every_rank(
    answered: Callable[[str], Path], model: str
) -> None:
    folder = answered(model)
    expected = greedy_answers(folder, PROMPTS, GREEDY.max_tokens)
    found = [json.loads((folder / f"rank{r}.json").read_text()) for r in range(JOBS[model].world_size)]
    assert found == [expected] * JOBS[model].world_size
