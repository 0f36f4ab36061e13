"""What the GPU tests run in processes of their own.

Shape suffixes: B rollouts, S sequence.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from megarl.parallel.layout import EngineLayout
from megarl.ranks.publish import publisher_of
from megarl.roles import Role
from megarl.rollout.vllm import VllmEngine, VllmSpec
from megarl.train.megatron.build import transformer_engine_present
from megarl.train.reference import Reference
from megarl.types import GenerationRequest, Sequences
from megarl.verify.work import backend_on_rank, score
from tests.dist.publish_case import GREEDY, MAX_MODEL_LEN, PROMPTS

KV_CACHE_BYTES = 256 << 20


def builds_with_transformer_engine() -> bool:
    """Return whether models here are built of Transformer Engine's layers."""
    return transformer_engine_present()


def all_logprobs(role: Role, everything: Sequences, temperature: float) -> Tensor:
    """Return the log-probs [B, S] of every token that counts."""
    logprobs_BS = score(Reference(backend_on_rank(role)), everything, temperature)
    assert logprobs_BS is not None
    return logprobs_BS


def answers_after_publishing(role: Role) -> list[list[int]]:
    """Return the greedy answers of an engine that started random, and got the weights of a trainer's role."""
    backend = backend_on_rank(role)
    engine = VllmEngine(
        VllmSpec(
            model_folder=role.model.here(),
            dtype="bfloat16",
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=len(PROMPTS),
            enforce_eager=True,
            kv_cache_bytes=KV_CACHE_BYTES,
        )
    )
    publisher_of(backend, engine, EngineLayout(1)).publish(1)
    rollouts = engine.generate([GenerationRequest(prompt, 0) for prompt in PROMPTS], GREEDY)
    answers = [list(rollout.token_ids) for (rollout,) in rollouts]
    engine.shutdown()
    return answers


def answers_of_plain_vllm(folder: Path) -> list[list[int]]:
    """Return the greedy answers of vLLM as anyone starts it on ``folder``."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=str(folder),
        dtype="bfloat16",
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=len(PROMPTS),
        enforce_eager=True,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
    )
    params = SamplingParams(temperature=0.0, max_tokens=GREEDY.max_tokens, ignore_eos=True)
    outputs = engine.generate([{"prompt_token_ids": list(prompt)} for prompt in PROMPTS], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]
