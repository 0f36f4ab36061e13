"""What ranks have to equal: Hugging Face's eager model in float32 and torch's AdamW, one sequence at a time.

Losses are written out here once more, from their definitions, and share no code with megarl.

Shape suffixes: B rollouts, S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarl.algorithm.loss_specs import LossSpec, PolicyLossSpec
from megarl.algorithm.policy_loss import PolicyLossSettings
from megarl.roles import Training
from megarl.types import PolicyBatch, Sequences
from megarl.verify.reference import hf_logits_BSV, hf_logprobs_BS, load


def greedy_answers(folder: Path, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
    """Return the ``num_tokens`` most probable tokens after each prompt, one by one; none ends an answer."""
    hf, answers = load(folder), []
    for prompt in prompts:
        tokens = hf.generate(
            torch.tensor([prompt]), max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        answers.append(tokens[0, len(prompt) :].tolist())
    return answers


@dataclass(frozen=True)
class Trained:
    """What some optimizer steps did: loss and gradient norm of each, the first gradients and the last weights."""

    losses: list[float]
    grad_norms: list[float]
    first_gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def train(
    folder: Path, batch: PolicyBatch, loss: LossSpec, training: Training, steps: int, model: Any = None
) -> Trained:
    """Take optimizer steps on the whole of ``batch``. model: in place of that in ``folder``; frozen parts stay."""
    model = model or load(folder)
    # Megatron's rule: no weight decay on norms and biases.
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [[p for p in trained.values() if (p.dim() > 1) == decays] for decays in (False, True)]
    adam = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.0}, {"params": groups[1], "weight_decay": training.weight_decay}],
        lr=training.lr,
        betas=training.betas,
        eps=training.eps,
    )
    losses, grad_norms, gradients = [], [], []
    for _ in range(steps):
        adam.zero_grad()
        value = _policy_loss(model, batch, loss) if isinstance(loss, PolicyLossSpec) else sft_loss(model, batch)
        value.backward()
        losses.append(value.item())
        gradients.append(checkpoint_tensors(model, {name: p.grad.clone() for name, p in trained.items()}))
        grad_norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip_grad).item())
        adam.step()
    weights = checkpoint_tensors(model, {name: p.detach() for name, p in model.named_parameters()})
    return Trained(losses, grad_norms, gradients[0], weights)


def checkpoint_tensors(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``tensors``, by the names of ``model``'s parameters, as a checkpoint has them: each expert apart."""
    is_mixtral = model.config.model_type == "mixtral"
    gate, up, down = ("w1", "w3", "w2") if is_mixtral else ("gate_proj", "up_proj", "down_proj")
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        experts, is_fused, kind = name.rpartition("experts.")
        if is_fused:
            for e, of_expert in enumerate(tensor):
                parts = (gate, up) if kind == "gate_up_proj" else (down,)
                for part, rows in zip(parts, of_expert.chunk(len(parts)), strict=True):
                    found[f"{experts}experts.{e}.{part}.weight"] = rows
        else:
            found[name] = tensor
    if not is_mixtral:
        return found
    return {name.replace(".mlp.", ".block_sparse_moe."): tensor for name, tensor in found.items()}


def sft_loss(model: Any, batch: Sequences) -> Tensor:
    """Return minus the mean log-prob of the tokens that count."""
    return -hf_logprobs_BS(model, batch)[batch.mask_BS].mean()


def _policy_loss(model: Any, batch: PolicyBatch, spec: PolicyLossSpec) -> Tensor:
    assert batch.old_logprobs_BS is not None
    log_softmax_BSV = (hf_logits_BSV(model, batch) / spec.temperature).log_softmax(-1)
    current_BS = log_softmax_BSV.gather(-1, batch.tokens_BS[..., None])[..., 0]
    loss_BS = _ppo_BS((current_BS - batch.old_logprobs_BS).exp(), batch.advantages_BS, spec.settings)
    loss_BS = loss_BS + spec.entropy_coef * (log_softmax_BSV.exp() * log_softmax_BSV).sum(-1)
    if spec.kl_coef is not None:
        assert batch.ref_logprobs_BS is not None
        difference_BS = current_BS - batch.ref_logprobs_BS
        kl_BS = {
            "mse": difference_BS.square() / 2,
            "low_var_kl": (-difference_BS).exp() - 1 + difference_BS,
        }[spec.kl_type]
        loss_BS = loss_BS + spec.kl_coef * kl_BS
    return _aggregate(loss_BS, batch.mask_BS, spec)


def _ppo_BS(ratio_BS: Tensor, advantages_BS: Tensor, settings: PolicyLossSettings) -> Tensor:
    assert settings.clip_c is not None
    clipped_BS = ratio_BS.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    loss_BS = -torch.minimum(ratio_BS * advantages_BS, clipped_BS * advantages_BS)
    return torch.where(advantages_BS < 0, loss_BS.minimum(-settings.clip_c * advantages_BS), loss_BS)


def _aggregate(loss_BS: Tensor, mask_BS: Tensor, spec: PolicyLossSpec) -> Tensor:
    rows = [loss_S[mask_S] for loss_S, mask_S in zip(loss_BS, mask_BS, strict=True) if mask_S.any()]
    if spec.loss_agg_mode == "token-mean":
        return torch.cat(rows).mean()
    if spec.loss_agg_mode == "seq-mean-token-mean":
        return torch.stack([row.mean() for row in rows]).mean()
    mean_sum = torch.stack([row.sum() for row in rows]).mean()
    if spec.loss_agg_mode == "seq-mean-token-sum":
        return mean_sum
    assert spec.loss_agg_mode == "seq-mean-token-sum-norm" and spec.max_tokens is not None
    return mean_sum / spec.max_tokens
