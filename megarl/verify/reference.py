"""What megarl has to equal: Hugging Face's eager model in float32 on CPU, one sequence at a time.

Shape suffixes: B rollouts, S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from megarl.batching.pack import sequences_to_batch
from megarl.types import Batch

LENGTHS = (9, 12, 12, 7, 16, 5, 9, 3)
PROMPT_LENGTH = 2
"""Rows of different and of equal lengths, odd sums; the last row has no token that is trained on."""

TEMPERATURE = 0.7


@dataclass(frozen=True)
class Reference:
    """A model's folder, what it is asked, and what Hugging Face says of it.

    everything: masks every token but the first of each row. rollouts: the same tokens as rollouts of a policy close to
    the model. logprobs_BS: of everything. rounded_logprobs_BS: with the weights rounded to bfloat16, in float32.
    hf_bf16: the mean difference between those and what Hugging Face says when it computes in bfloat16.
    """

    folder: Path
    everything: Batch
    rollouts: Batch
    logprobs_BS: Tensor
    rounded_logprobs_BS: Tensor
    hf_bf16: float


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Return the model of ``folder``."""
    disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", trust_remote_code=False
    ).eval()


@torch.no_grad()
def make_reference(folder: Path, vocab_size: int, num_rows: int) -> Reference:
    """Ask Hugging Face about the model in ``folder`` and ``num_rows`` random rows."""
    generator = torch.Generator().manual_seed(0)
    lengths = list(islice(cycle(LENGTHS), num_rows))
    tokens = [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]
    everything = sequences_to_batch(tokens, [[True] * length for length in lengths])
    trained_on = sequences_to_batch(tokens, [_mask(length) for length in lengths])
    model = load(folder)
    logprobs_BS = _logprobs_BS(model, everything)
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())
    rounded_BS = _logprobs_BS(model, everything)
    in_bf16_BS = _logprobs_BS(load(folder, torch.bfloat16), everything)

    def near_logprobs_BS() -> Tensor:
        noise_BS = 0.2 * torch.randn(logprobs_BS.shape, generator=generator)
        return (logprobs_BS + noise_BS) * trained_on.mask_BS

    rollouts = replace(
        trained_on,
        old_logprobs_BS=near_logprobs_BS(),
        ref_logprobs_BS=near_logprobs_BS(),
        advantages_BS=torch.randn(logprobs_BS.shape, generator=generator) * trained_on.mask_BS,
    )
    hf_bf16 = mean_difference(in_bf16_BS, rounded_BS, everything)
    return Reference(folder, everything, rollouts, logprobs_BS, rounded_BS, hf_bf16)


def mean_difference(found_BS: Tensor, expected_BS: Tensor, batch: Batch) -> float:
    """Return the mean absolute difference over the masked tokens: rounding to bfloat16 makes the largest a draw."""
    return float((found_BS - expected_BS).abs()[batch.mask_BS].mean())


@torch.no_grad()
def greedy(folder: Path, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
    """Return the most likely ``num_tokens`` tokens after each prompt."""
    model = load(folder)
    asked = {"max_new_tokens": num_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return [model.generate(torch.tensor([prompt]), **asked)[0, len(prompt) :].tolist() for prompt in prompts]


def _logprobs_BS(model: Any, batch: Batch) -> Tensor:
    """Return log-probs of the masked tokens under softmax(logits / TEMPERATURE), zero elsewhere."""
    rows = []
    for tokens_S, length in zip(batch.tokens_BS, batch.lengths_B.tolist(), strict=True):
        logits_SV = model(tokens_S[None, :length]).logits[0, :-1].float() / TEMPERATURE
        logprobs_S = logits_SV.log_softmax(-1).gather(-1, tokens_S[1:length, None])[:, 0]
        rows.append(F.pad(logprobs_S, (1, len(tokens_S) - length)))
    return torch.stack(rows) * batch.mask_BS


def _mask(length: int) -> list[bool]:
    return [position >= PROMPT_LENGTH and length > PROMPT_LENGTH + 1 for position in range(length)]
