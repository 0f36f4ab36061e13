"""A run that trains adapters: its engine is the merged model after every publish, and its reference the base model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.e2e.recorded_ppo import RECORDED_TO
from tests.launch import run, torchrun
from tests.tiny_task import NUM_RANKS, write_weights

ENGINE_TOLERANCE = 1e-4
REPOSITORY = Path(__file__).parents[2]
NUM_STEPS, RANK, ALPHA = 2, 4, 16
OVERRIDES = (
    "trainer.run_dir=run",
    "actor_rollout_ref.model.init=pretrained",
    f"actor_rollout_ref.model.lora_rank={RANK}",
    f"actor_rollout_ref.model.lora_alpha={ALPHA}",
    "actor_rollout_ref.actor.optim.lr=0.02",
    "actor_rollout_ref.actor.ppo_mini_batch_size=32",  # one optimizer step a step, so that the first has no KL
    f"trainer.total_training_steps={NUM_STEPS}",
    "trainer.test_freq=1",
    "trainer.save_freq=1",
)
pytestmark = pytest.mark.long  # tests/dist compares what leaves the trainer with peft each time


@dataclass(frozen=True)
class Done:
    """The metrics of each step, and what every replica answered to the validation after each publish."""

    base: Path
    exported: tuple[Path, ...]
    metrics: list[dict[str, Any]]
    validations: list[dict[str, Any]]


@pytest.fixture(scope="module")
def done(tiny_task: Path) -> Done:
    """Train adapters of the tiny model on FSDP, with a vLLM in the ranks."""
    write_weights(tiny_task / "model")
    recorded = tiny_task / "recorded.json"
    command = ("-m", "tests.e2e.recorded_ppo", "--config-dir=.", "--config-name=rl_fsdp", *OVERRIDES)
    environ = {RECORDED_TO: str(recorded)}
    finished = run(torchrun(NUM_RANKS, *command), tiny_task, python_path=REPOSITORY, environ=environ)
    assert finished.code == 0, finished.output
    _check_of_the_first_publish, *validations = json.loads(recorded.read_text())
    lines = (tiny_task / "run" / "metrics.jsonl").read_text().splitlines()
    checkpoints = tiny_task / "run" / "checkpoints"
    exported = (checkpoints / "step_1", checkpoints / "final")
    return Done(tiny_task / "model", exported, [json.loads(line) for line in lines][1:], validations)


def _transformers(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def _merged_by_peft(base: Path, adapter: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(_transformers(base), str(adapter)).merge_and_unload()


def _models(done: Done) -> list[Any]:
    """Return transformers' model of each publish: the base, then what peft makes of it and the saved adapter."""
    return [_transformers(done.base), *(_merged_by_peft(done.base, folder / "adapter") for folder in done.exported)]


@torch.no_grad()
def _logprobs(model: Any, prompt: list[int], answer: list[int]) -> list[float]:
    tokens = torch.tensor([[*prompt, *answer]])
    logprobs_SV = model(tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logprobs_SV.gather(1, torch.tensor(answer)[:, None])[:, 0].tolist()


def test_greedy_answers_after_every_publish_are_those_of_the_base_and_what_peft_merges_into_it(done: Done) -> None:
    assert [validation["versions"] for validation in done.validations] == [[0], [1], [2]]
    for model, validation in zip(_models(done), done.validations, strict=True):
        expected = []
        for prompt in validation["prompts"]:
            tokens = model.generate(torch.tensor([prompt]), max_new_tokens=validation["max_tokens"], do_sample=False)
            expected.append(tokens[0, len(prompt) :].tolist())
        assert validation["answers_by_replica"] == [expected]
    answers = [validation["answers_by_replica"] for validation in done.validations]
    assert answers[0] != answers[1] != answers[2], "training changed nothing"


def test_log_probs_of_the_engine_after_every_publish_are_those_of_the_same_models(done: Done) -> None:
    for model, validation in zip(_models(done), done.validations, strict=True):
        (answers,), (told,) = validation["answers_by_replica"], validation["logprobs_by_replica"]
        for prompt, answer, logprobs in zip(validation["prompts"], answers, told, strict=True):
            assert logprobs == pytest.approx(_logprobs(model, prompt, answer), abs=ENGINE_TOLERANCE)


def test_the_engine_and_the_trainer_agree_at_every_step(done: Done) -> None:
    assert [line["rollout/policy_version"] for line in done.metrics] == list(range(NUM_STEPS))
    assert all(line["rollout_train/logprob_diff_max"] < ENGINE_TOLERANCE for line in done.metrics)


def test_the_reference_is_the_base_model(done: Done) -> None:
    """Adapters begin at zero, so that there is no KL before the first optimizer step, and some after it."""
    first, second = (line["actor/kl"] for line in done.metrics)
    assert abs(first) < 1e-6 < 1e-4 < second


def test_an_exported_folder_is_the_merged_model_beside_its_adapter(done: Done) -> None:
    base = load_file(done.base / "model.safetensors")
    for folder in done.exported:
        exported, merged = load_file(folder / "model.safetensors"), _merged_by_peft(done.base, folder / "adapter")
        for name, tensor in merged.state_dict().items():
            torch.testing.assert_close(exported[name], tensor, rtol=0, atol=1e-6)
        changed = {name for name, tensor in exported.items() if not tensor.equal(base[name])}
        assert changed == {name for name in base if "_proj." in name}
        written = json.loads((folder / "adapter" / "adapter_config.json").read_text())
        assert (written["r"], written["lora_alpha"]) == (RANK, ALPHA)
