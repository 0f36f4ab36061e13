"""vLLM in the ranks of a trainer against Hugging Face's ``generate`` and logits.

Three jobs run at the same time: a Qwen3 in two replicas of TP2 on four ranks, a mixture of experts in one of TP2, and
in another a Qwen2, which has biases, tied embeddings and fewer key/value heads than ranks.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from megarl.rollout.engine import UNPUBLISHED
from megarl.types import Rollout
from tests.dist.ranks import run_case
from tests.dist.vllm_case import GREEDY, MAX_NUM_SEQS, PROMPTS, REQUESTS, SAMPLED, TRUNCATED

SHAPE = {
    "vocab_size": 300,  # no multiple of the 64 that vLLM pads to
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,  # unlike 0.02, gives distributions that are far from uniform
}
QWEN3 = SHAPE | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": False}
CONFIGS: dict[str, PretrainedConfig] = {
    "qwen3": Qwen3Config(**QWEN3),
    "qwen3_moe": Qwen3MoeConfig(**QWEN3, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48),
    "qwen2": Qwen2Config(**SHAPE, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True),
}
NUM_RANKS = {"qwen3": 4, "qwen3_moe": 2, "qwen2": 2}
TP = 2
TOLERANCE = 1e-4
ENGINES = [("qwen3", 0), ("qwen3", 2), ("qwen3_moe", 0), ("qwen2", 0)]
"""Job and first rank of each replica."""


@dataclass(frozen=True)
class Job:
    """A finished job. models: Hugging Face's ``a`` and ``b``. ranks: what each rank saved."""

    models: dict[str, Any]
    ranks: list[dict[str, Any]]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """Run all jobs at once."""
    folders = {name: tmp_path_factory.mktemp(name) for name in CONFIGS}
    models = {name: _save_models(CONFIGS[name], folder) for name, folder in folders.items()}
    run_case("tests.dist.vllm_case", TP, *(f"{folders[job]}={NUM_RANKS[job]}" for job in folders))
    return {name: Job(models[name], _results(folder, NUM_RANKS[name])) for name, folder in folders.items()}


def _save_models(config: PretrainedConfig, folder: Path) -> dict[str, Any]:
    models = {}
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        models[name] = AutoModelForCausalLM.from_config(config).eval()
        for parameter_name, parameter in models[name].named_parameters():
            if parameter_name.endswith("bias"):
                torch.nn.init.normal_(parameter)  # Hugging Face starts them at zero, where none can be misplaced
        models[name].save_pretrained(folder / name)
    return models


def _results(folder: Path, num_ranks: int) -> list[dict[str, Any]]:
    return [pickle.loads((folder / f"rank{rank}.pickle").read_bytes()) for rank in range(num_ranks)]


def _greedy_by_hugging_face(model: Any, prompt: tuple[int, ...]) -> tuple[int, ...]:
    output = model.generate(
        torch.tensor([prompt]), max_new_tokens=GREEDY.max_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return tuple(output[0, len(prompt) :].tolist())


def _logits_by_hugging_face(model: Any, prompt: tuple[int, ...], response: tuple[int, ...]) -> torch.Tensor:
    """Return the logits [response tokens, vocabulary] from which each token of the response was sampled."""
    with torch.no_grad():
        logits_SV = model(torch.tensor([prompt + response])).logits[0]
    return logits_SV[len(prompt) - 1 : -1]


def _largest_difference(rollout: Rollout, logits_SV: torch.Tensor) -> float:
    expected_S = logits_SV.log_softmax(-1)[range(len(rollout.token_ids)), list(rollout.token_ids)]
    return (expected_S - torch.tensor(rollout.logprobs)).abs().max().item()


@pytest.mark.parametrize("weights", ["a", "b"])
@pytest.mark.parametrize(("name", "rank"), ENGINES)
def test_greedy_tokens_equal_hugging_faces_after_each_publication(
    jobs: dict[str, Job], name: str, rank: int, weights: str
) -> None:
    job = jobs[name]
    expected = [_greedy_by_hugging_face(job.models[weights], prompt) for prompt in PROMPTS]
    assert [rollout.token_ids for (rollout,) in job.ranks[rank][f"greedy {weights}"]] == expected


def test_all_layers_but_the_embedding_compute_with_packed_weights(jobs: dict[str, Job]) -> None:
    for job in jobs.values():
        assert [rank["layers not packed"] for rank in job.ranks] == [["model.embed_tokens"]] * len(job.ranks)


def test_the_two_models_answer_differently(jobs: dict[str, Job]) -> None:
    for job in jobs.values():
        greedy_a, greedy_b = job.ranks[0]["greedy a"], job.ranks[0]["greedy b"]
        assert all(a.token_ids != b.token_ids for (a,), (b,) in zip(greedy_a, greedy_b, strict=True))


@pytest.mark.parametrize(("name", "rank"), ENGINES)
def test_log_probs_are_those_at_the_sampling_temperature(jobs: dict[str, Job], name: str, rank: int) -> None:
    for prompt, group in zip(PROMPTS, jobs[name].ranks[rank]["sampled"], strict=True):
        for rollout in group:
            logits_SV = _logits_by_hugging_face(jobs[name].models["a"], prompt, rollout.token_ids)
            assert _largest_difference(rollout, logits_SV / SAMPLED.temperature) < TOLERANCE


def test_greedy_log_probs_are_those_at_temperature_one(jobs: dict[str, Job]) -> None:
    for prompt, (rollout,) in zip(PROMPTS, jobs["qwen3"].ranks[0]["greedy a"], strict=True):
        logits_SV = _logits_by_hugging_face(jobs["qwen3"].models["a"], prompt, rollout.token_ids)
        assert _largest_difference(rollout, logits_SV) < TOLERANCE


def test_log_probs_after_top_k_and_top_p_are_renormalised(jobs: dict[str, Job]) -> None:
    for prompt, (rollout,) in zip(PROMPTS, jobs["qwen3"].ranks[0]["truncated"], strict=True):
        logits_SV = _logits_by_hugging_face(jobs["qwen3"].models["a"], prompt, rollout.token_ids)
        assert _largest_difference(rollout, _truncate(logits_SV / TRUNCATED.temperature)) < TOLERANCE


def _truncate(logits_SV: torch.Tensor) -> torch.Tensor:
    """Keep the top_k tokens, and of these the fewest whose probability reaches top_p."""
    assert TRUNCATED.top_k is not None
    top_SK, index_SK = logits_SV.topk(TRUNCATED.top_k, -1)
    probs_SK = top_SK.softmax(-1)
    top_SK[probs_SK.cumsum(-1) - probs_SK >= TRUNCATED.top_p] = -torch.inf
    return torch.full_like(logits_SV, -torch.inf).scatter(-1, index_SK, top_SK)


def test_samples_depend_neither_on_the_batch_nor_on_the_replica(jobs: dict[str, Job]) -> None:
    ranks = jobs["qwen3"].ranks
    together, alone = ranks[0]["sampled"], ranks[2]["sampled"]
    assert [[r.token_ids for r in group] for group in together] == [[r.token_ids for r in group] for group in alone]


def test_without_seeds_of_their_own_samples_repeat_with_their_batch_on_every_rank(jobs: dict[str, Job]) -> None:
    for rank in jobs["qwen3"].ranks:
        first, again = ([[r.token_ids for r in group] for group in call] for call in rank["not reproducible"])
        assert first == again
        assert first != [[r.token_ids for r in group] for group in rank["sampled"]]
        assert [len(set(group)) for group in first] == [SAMPLED.n] * len(REQUESTS)


def test_samples_of_a_group_differ(jobs: dict[str, Job]) -> None:
    groups = jobs["qwen3"].ranks[0]["sampled"]
    assert [len({rollout.token_ids for rollout in group}) for group in groups] == [SAMPLED.n] * len(REQUESTS)


@pytest.mark.parametrize(("name", "rank"), ENGINES)
def test_ranks_of_a_replica_return_the_same(jobs: dict[str, Job], name: str, rank: int) -> None:
    first, second = jobs[name].ranks[rank : rank + TP]
    assert first == second


def test_rollouts_carry_the_version_that_was_published(jobs: dict[str, Job]) -> None:
    results = jobs["qwen3"].ranks[0]
    versions = {key: {r.policy_version for (r,) in results[key]} for key in ("greedy a", "stopped", "greedy b")}
    assert versions == {"greedy a": {1}, "stopped": {1}, "greedy b": {2}}
    assert results["unpublished"] == UNPUBLISHED


def test_a_response_ends_with_its_stop_token(jobs: dict[str, Job]) -> None:
    results = jobs["qwen3"].ranks[0]
    stop = results["greedy a"][0][0].token_ids[2]
    for (full,), (stopped,) in zip(results["greedy a"], results["stopped"], strict=True):
        length = full.token_ids.index(stop) + 1 if stop in full.token_ids else len(full.token_ids)
        assert stopped.token_ids == full.token_ids[:length]
        assert stopped.finish_reason == ("stop" if stop in full.token_ids else "length")


def test_more_requests_than_sequences_at_once_are_answered_in_order(jobs: dict[str, Job]) -> None:
    groups = jobs["qwen3"].ranks[0]["sampled"]
    assert len(REQUESTS) * SAMPLED.n > MAX_NUM_SEQS
    assert [len(group) for group in groups] == [SAMPLED.n] * len(REQUESTS)


def test_a_replica_without_requests_holds_nobody_up(jobs: dict[str, Job]) -> None:
    first, second = (jobs["qwen3"].ranks[rank]["only the first replica has requests"] for rank in (0, 2))
    assert first == jobs["qwen3"].ranks[0]["greedy a"]
    assert second == []


def test_generating_before_the_first_publication_is_an_error(jobs: dict[str, Job]) -> None:
    assert jobs["qwen3"].ranks[0]["before publishing"].startswith("PublishError: generate was called before")


def test_a_prompt_that_leaves_no_room_for_the_response_is_an_error(jobs: dict[str, Job]) -> None:
    assert "max_model_len = 192" in jobs["qwen3"].ranks[0]["too long"]


def test_the_trainers_groups_outlive_the_engine(jobs: dict[str, Job]) -> None:
    assert [rank["sum over Megatron's tensor axis afterwards"] for rank in jobs["qwen3"].ranks] == [2.0] * 4


def test_nothing_is_left_in_shared_memory(jobs: dict[str, Job]) -> None:
    names = {job.ranks[0]["job"] for job in jobs.values()}
    assert len(names) == len(jobs)
    assert [path.name for path in Path("/dev/shm").iterdir() if any(name in path.name for name in names)] == []
