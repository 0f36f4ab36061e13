"""What megarl has to equal: Hugging Face's eager model on CPU, one sequence at a time, and how exact that one is.

Shape suffixes: B rollouts, S sequence, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megarl.batching.pack import sequences_to_batch
from megarl.types import PolicyBatch, Sequences

LENGTHS = (9, 12, 12, 7, 16, 5, 9, 3)
PROMPT_LENGTH = 2
"""Rows of different and of equal lengths, odd sums; the last row has no token that is trained on."""

TEMPERATURE = 0.7


@dataclass(frozen=True)
class Noise:
    """Errors of Hugging Face's own, by which those of any layout are measured.

    logprobs: the largest error of a log-prob in float32, absolute. gradient: that of a policy gradient in float32, as a
    vector, relative. bf16: the mean error of a log-prob in bfloat16. All are what float64 says, but for the last: it is
    from float32 with weights rounded to bfloat16.
    """

    logprobs: float
    gradient: float
    bf16: float


@dataclass(frozen=True)
class Reference:
    """A model's folder, what it is asked, and what Hugging Face says of it.

    everything: counts every token but the first of each row. rollouts: the same tokens as rollouts of a policy close to
    the model. logprobs_BS: of everything. exact_logprobs_BS: in float64. rounded_logprobs_BS: with the weights rounded
    to bfloat16, in float32.
    """

    folder: Path
    everything: Sequences
    rollouts: PolicyBatch
    logprobs_BS: Tensor
    exact_logprobs_BS: Tensor
    rounded_logprobs_BS: Tensor
    noise: Noise


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Return the model of ``folder``."""
    from transformers import AutoModelForCausalLM  # here, since ranks shouldn't wait for it
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager", trust_remote_code=False
    ).eval()


class InFloat64(TorchFunctionMode):
    """Computes in float64 what a model asks for in float32: norms, softmax and logits of Hugging Face's do."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = {name: _widened(value) for name, value in (kwargs or {}).items()}
        return (Tensor.double if func is Tensor.float else func)(*map(_widened, args), **named)


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@torch.no_grad()
def make_reference(folder: Path, vocab_size: int, num_rows: int = len(LENGTHS)) -> Reference:
    """Ask Hugging Face about the model in ``folder`` and ``num_rows`` random rows."""
    generator = torch.Generator().manual_seed(0)
    trained_on = random_sequences(list(islice(cycle(LENGTHS), num_rows)), vocab_size, generator)
    everything = with_every_token(trained_on)
    model = load(folder)
    logprobs_BS = hf_logprobs_BS(model, everything, TEMPERATURE)

    def near_logprobs_BS() -> Tensor:
        noise_BS = 0.2 * torch.randn(logprobs_BS.shape, generator=generator)
        return (logprobs_BS + noise_BS) * trained_on.mask_BS

    rollouts = PolicyBatch(
        **vars(trained_on),
        old_logprobs_BS=near_logprobs_BS(),
        ref_logprobs_BS=near_logprobs_BS(),
        advantages_BS=torch.randn(logprobs_BS.shape, generator=generator) * trained_on.mask_BS,
    )
    exact_BS, gradient_error = _compare_with_float64(model, folder, everything, rollouts)
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())
    rounded_BS = hf_logprobs_BS(model, everything, TEMPERATURE)
    in_bf16_BS = hf_logprobs_BS(load(folder, torch.bfloat16), everything, TEMPERATURE)
    noise = Noise(
        float((logprobs_BS - exact_BS).abs().max()),
        gradient_error,
        mean_difference(in_bf16_BS, rounded_BS, everything),
    )
    return Reference(folder, everything, rollouts, logprobs_BS, exact_BS, rounded_BS, noise)


def _compare_with_float64(
    model: Any, folder: Path, everything: Sequences, rollouts: PolicyBatch
) -> tuple[Tensor, float]:
    """Return log-probs in float64, and how far the gradient of ``model`` is from that in float64, relative to it."""
    exact = load(folder, torch.float64)
    with InFloat64():
        exact_BS = hf_logprobs_BS(exact, everything, TEMPERATURE)
        _differentiate(exact, rollouts)
    _differentiate(model, rollouts)
    error = norm = 0.0
    for near, right in zip(model.parameters(), exact.parameters(), strict=True):
        if right.grad is not None:  # an expert that no token takes has none
            error += float((near.grad - right.grad).square().sum())
            norm += float(right.grad.square().sum())
    model.zero_grad()
    return exact_BS, math.sqrt(error / norm)


@torch.enable_grad()
def _differentiate(model: Any, rollouts: PolicyBatch) -> None:
    """Leave the policy gradient of ``rollouts`` on the parameters."""
    gains_BS = hf_logprobs_BS(model, rollouts, TEMPERATURE) * rollouts.advantages_BS
    (-gains_BS[rollouts.mask_BS].mean()).backward()


def random_sequences(lengths: Sequence[int], vocab_size: int, generator: torch.Generator) -> Sequences:
    """Return rows of random tokens, each a prompt and a response, whose tokens count if it has two or more."""
    tokens = [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]
    masks = [[i >= PROMPT_LENGTH and length > PROMPT_LENGTH + 1 for i in range(length)] for length in lengths]
    return sequences_to_batch(tokens, masks)


def with_every_token(sequences: Sequences) -> Sequences:
    """Return the sequences, in which every token but the first of each row counts."""
    mask_BS = torch.arange(sequences.tokens_BS.shape[1]) < sequences.lengths_B[:, None]
    mask_BS[:, 0] = False
    return replace(sequences.alone(), mask_BS=mask_BS)


def mean_difference(found_BS: Tensor, expected_BS: Tensor, sequences: Sequences) -> float:
    """Return the mean absolute difference over the masked tokens: rounding to bfloat16 makes the largest a draw."""
    return float((found_BS - expected_BS).abs()[sequences.mask_BS].mean())


def hf_logits_BSV(model: Any, sequences: Sequences) -> Tensor:
    """Return the logits that predict token s at position s, in float32; zero for first tokens and padding."""
    rows = []
    for tokens_S, length in zip(sequences.tokens_BS, sequences.lengths_B.tolist(), strict=True):
        logits_SV = model(tokens_S[None, :length]).logits[0, :-1].float()
        rows.append(F.pad(logits_SV, (0, 0, 1, len(tokens_S) - length)))
    return torch.stack(rows)


def hf_logprobs_BS(model: Any, sequences: Sequences, temperature: float = 1.0) -> Tensor:
    """Return log-probs of the masked tokens under softmax(logits / temperature), zero elsewhere."""
    scaled_BSV = (hf_logits_BSV(model, sequences) / temperature).log_softmax(-1)
    logprobs_BS: Tensor = scaled_BSV.gather(-1, sequences.tokens_BS[..., None])[..., 0] * sequences.mask_BS
    return logprobs_BS


@torch.no_grad()
def greedy(folder: Path, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
    """Return the most likely ``num_tokens`` tokens after each prompt."""
    model = load(folder)
    asked = {"max_new_tokens": num_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return [model.generate(torch.tensor([prompt]), **asked)[0, len(prompt) :].tolist() for prompt in prompts]
