"""Weights that change while an engine samples: every token is of those that its rollout says sampled it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.dist.ranks import run_case
from tests.dist.stream_case import MAX_TOKENS, PROMPTS, SWITCH_AT
from tests.dist.tiny_models import save_tiny_model

GREEDY, SAMPLED = range(100, 103), range(200, 203)

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a case that has run, with its two models."""
    folder = tmp_path_factory.mktemp("stream")
    for name in "ab":
        save_tiny_model("qwen3-untied", folder / name, head_dim=32)  # the smallest that vLLM's attention takes on CPU
    path = folder / "b" / "model.safetensors"
    torch.manual_seed(0)
    save_file({n: t + 0.3 * torch.randn_like(t) for n, t in load_file(path).items()}, path, {"format": "pt"})
    run_case("tests.dist.stream_case", folder)
    return folder


@pytest.fixture(scope="module")
def answers(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what the engine answered: tokens, log-probs, first version and switches."""
    found: dict[str, dict[str, Any]] = json.loads((folder / "answers.json").read_text())
    return found


@torch.no_grad()
def logprobs(folder: Path, prompt: tuple[int, ...], tokens: list[int], temperature: float) -> list[float]:
    """Return what transformers gives the tokens of a response."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits_SV = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    all_SV = (logits_SV / temperature).log_softmax(-1)
    return all_SV.gather(-1, torch.tensor(tokens)[:, None])[:, 0].tolist()


def test_tokens_before_the_switch_are_of_the_older_weights_and_those_after_it_of_the_newer(
    folder: Path, answers: dict[str, dict[str, Any]]
) -> None:
    for number in (*GREEDY, *SAMPLED):
        temperature, prompt = (1.0 if number in GREEDY else 0.8), PROMPTS[number % 100]
        for tokens, found, first, switches in answers["across"][str(number)]:
            assert (len(tokens), first, switches) == (MAX_TOKENS, 0, [[SWITCH_AT, 2]])
            older, newer = (logprobs(folder / name, prompt, tokens, temperature) for name in "ab")
            assert found[:SWITCH_AT] == pytest.approx(older[:SWITCH_AT], abs=1e-4)
            assert found[SWITCH_AT:] == pytest.approx(newer[SWITCH_AT:], abs=1e-4)
            assert found[SWITCH_AT:] != pytest.approx(older[SWITCH_AT:], abs=1e-2)


def test_what_is_asked_after_a_rest_is_answered_by_the_weights_that_were_taken_last(
    answers: dict[str, dict[str, Any]],
) -> None:
    before, after = answers["a"], answers["a after a rest"]
    for number in range(len(PROMPTS)):
        [[tokens, *_]], [[again, *_]] = before[str(number)], after[str(600 + number)]
        assert tokens == again
    assert {version for those in after.values() for *_, version, _ in those} == {3}


def test_a_greedy_rollout_goes_on_as_the_newer_weights_would_from_there(answers: dict[str, dict[str, Any]]) -> None:
    for number in map(str, GREEDY):
        [[tokens, *_]], [[alone, *_]] = answers["across"][number], answers["a"][str(int(number) - 100)]
        assert tokens[:SWITCH_AT] == alone[:SWITCH_AT]
        [[continued, _]] = answers["b from there"][number]
        assert tokens[SWITCH_AT:] == continued


def test_a_rollout_of_which_no_token_was_sampled_has_the_newer_version_alone(
    folder: Path, answers: dict[str, dict[str, Any]]
) -> None:
    for number, those in answers["before the first token"].items():
        for tokens, found, first, switches in those:
            assert (first, switches) == (3, [])
            expected = logprobs(folder / "a", PROMPTS[int(number) % 100], tokens, 0.8)
            assert found == pytest.approx(expected, abs=1e-4)
