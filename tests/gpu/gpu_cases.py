"""What the GPU tests run in processes of their own.

Shape suffixes: B rollouts, S sequence.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megarl.parallel.layout import Layout
from megarl.ranks.publish import Publisher
from megarl.rollout.vllm import VllmEngine, VllmSpec
from megarl.train.megatron.build import transformer_engine_present
from megarl.train.megatron.model import ModelSpec
from megarl.train.policy import Policy
from megarl.types import Batch, GenerationRequest
from megarl.weights.model_shape import read_model_shape
from megarl.weights.sources import SafetensorsSource
from tests.dist.parity_cases import Setup
from tests.dist.publish_case import GREEDY, MAX_MODEL_LEN, PROMPTS

KV_CACHE_BYTES = 256 << 20


def builds_with_transformer_engine() -> bool:
    """Return whether models here are built of Transformer Engine's layers."""
    return transformer_engine_present()


def with_every_token(batch: Batch) -> Batch:
    """Return ``batch`` with every token to be scored but the first of each sequence."""
    mask_BS = torch.arange(batch.tokens_BS.shape[1]) < batch.lengths_B[:, None]
    mask_BS[:, 0] = False
    return replace(batch, mask_BS=mask_BS)


def all_logprobs(setup: Setup, batch: Batch, temperature: float) -> Tensor:
    """Return the log-probs [B, S] of every token but the first of each sequence."""
    rows, micros = setup.share(with_every_token(batch))
    logprobs_BS = setup.model().logprobs(rows, micros, temperature)
    assert logprobs_BS is not None
    return logprobs_BS


def answers_after_publishing(folder: Path, device: str) -> list[list[int]]:
    """Return the greedy answers of an engine that started random, and got the weights of ``folder`` from a trainer."""
    shape = read_model_shape(folder)
    dtype = torch.bfloat16
    model = Policy(ModelSpec(shape, Layout(1), dtype, torch.device(device)), SafetensorsSource(folder, shape))
    engine = VllmEngine(
        VllmSpec(
            model_folder=str(folder),
            dtype="bfloat16",
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=len(PROMPTS),
            enforce_eager=True,
            kv_cache_bytes=KV_CACHE_BYTES,
        )
    )
    Publisher(model, engine, 1).publish(1)
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
