"""A family outside of the name map takes a step of GRPO on FSDP, and its engine answers as transformers does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megarl.data.verbs import verbs_tokenizer
from tests.e2e.recorded_ppo import RECORDED_TO
from tests.launch import run, torchrun
from tests.tiny_task import NUM_RANKS

ENGINE_TOLERANCE = 1e-4
REPOSITORY = Path(__file__).parents[2]
FAMILIES: dict[str, dict[str, Any]] = {
    "Gemma2": {"head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 32},
    "Phi3": {},
}


def _write_model(task: Path, family: str) -> str:
    """Write the config of a family beside the tokenizer of the task's model; return the folder's name."""
    tokenizer = verbs_tokenizer()
    config = getattr(transformers, f"{family}Config")(
        architectures=[f"{family}ForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        **FAMILIES[family],
    )
    folder = task / family
    shutil.copytree(task / "model", folder)
    config.save_pretrained(folder)
    return folder.name


def _answers(folder: Path, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """Return the greedy answers of transformers, each up to its end."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    end = model.config.eos_token_id
    return [
        model.generate(torch.tensor([prompt]), max_new_tokens=max_tokens, do_sample=False, eos_token_id=end)[
            0, len(prompt) :
        ].tolist()
        for prompt in prompts
    ]


@pytest.mark.long  # tests/dist compares the engine of such a family with transformers each time
@pytest.mark.parametrize("family", ["Gemma2", "Phi3"])
def test_a_step_of_grpo_reaches_an_engine_that_answers_as_transformers_does(tiny_task: Path, family: str) -> None:
    recorded, run_dir = tiny_task / f"{family}.json", f"runs/{family}"
    command = (
        *("-m", "tests.e2e.recorded_ppo", "--config-dir=.", "--config-name=rl_fsdp", f"trainer.run_dir={run_dir}"),
        f"actor_rollout_ref.model.path={_write_model(tiny_task, family)}",
        "actor_rollout_ref.actor.optim.lr=0.01",
        "trainer.total_training_steps=1",
    )
    environ = {RECORDED_TO: str(recorded)}
    finished = run(torchrun(NUM_RANKS, *command), tiny_task, python_path=REPOSITORY, environ=environ)
    assert finished.code == 0, finished.output
    assert f"{family}ForCausalLM is outside of the name map" in finished.stdout
    _check_of_the_first_publish, before, after = json.loads(recorded.read_text())
    final = tiny_task / run_dir / "checkpoints/final"
    (answers,) = after["answers_by_replica"]
    assert answers == _answers(final, after["prompts"], after["max_tokens"])
    assert answers != before["answers_by_replica"][0], "training changed nothing"
    lines = [json.loads(line) for line in (tiny_task / run_dir / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["rollout_train/logprob_diff_max"] < ENGINE_TOLERANCE
