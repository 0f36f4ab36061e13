"""A vLLM on CPU whose requests bring more tokens together than a step holds: seeded, and answered as each alone."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from megarl.types import Rollout
from tests.dist.prefill_case import PROMPTS, SAMPLED, STEP_TOKENS
from tests.dist.ranks import run_case

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[tuple[Rollout, ...]]]]:
    """Return the folder of a model, and what one rank answered for every budget of a step, and alone."""
    folder = tmp_path_factory.mktemp("prefill")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        initializer_range=0.15,
        tie_word_embeddings=False,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    run_case("tests.dist.prefill_case", folder)
    return folder, pickle.loads((folder / "answers.pickle").read_bytes())


@pytest.mark.long  # each time tests/dist/test_rollout_vllm.py has steps of many prompts
@pytest.mark.parametrize("budget", ["a step of one prompt", "vLLM's own step"])
def test_prompts_of_more_tokens_than_a_step_holds_are_sampled_as_each_alone(
    answers: tuple[Path, dict[str, list[tuple[Rollout, ...]]]], budget: str
) -> None:
    folder, found = answers
    assert sum(map(len, PROMPTS)) > STEP_TOKENS[budget]
    together, alone = found[budget], found["alone"]
    assert [[r.token_ids for r in group] for group in together] == [[r.token_ids for r in group] for group in alone]
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for prompt, (rollout,) in zip(PROMPTS, together, strict=True):
        with torch.no_grad():
            logits_SV = model(torch.tensor([prompt + rollout.token_ids])).logits[0, len(prompt) - 1 : -1]
        expected_SV = (logits_SV / SAMPLED.temperature).log_softmax(-1)
        expected_S = expected_SV[range(len(rollout.token_ids)), list(rollout.token_ids)]
        assert (expected_S - torch.tensor(rollout.logprobs)).abs().max() < TOLERANCE
