"""The router of experts: Megatron's choice of experts, with losses that no layout changes and a record of its choices.

Megatron's own load-balancing losses are over the tokens that happen to share a micro-batch, and are scaled for losses
that are divided by the number of tokens later. Here both losses are means over the sequences of a mini-batch, so it
makes no difference how they are packed, split and spread over ranks.

Shape suffixes: T positions on this rank, E experts, R sequences of a micro-batch and, first, their padding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megarl.config.router_losses import RouterLosses
from megarl.weights.model_shape import ModelShape

# Megatron's routers compare this name with None, but without Transformer Engine nothing defines it.
vars(moe_utils).setdefault("te_general_gemm", None)


@dataclass(frozen=True)
class RoutedSequences:
    """What the routers must know of a mini-batch: its sequences on all ranks, and at most how many share a pass."""

    total: int
    most_in_a_pass: int


class Router(TopKRouter):
    """Megatron's router, with ``losses`` in place of its own.

    ``sequences_BS`` says which sequence of the micro-batch a position belongs to, from 1, and 0 for padding.
    """

    sequences_BS: Tensor | None = None

    def __init__(self, losses: RouterLosses, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.losses = losses
        self._sequences = RoutedSequences(1, 1)
        self._sums: Tensor | None = None

    def start(self, sequences: RoutedSequences) -> None:
        """Begin a mini-batch."""
        self._sequences, self._sums = sequences, None

    def sums(self) -> Tensor:
        """Return the sums of this rank since the start, float64: ``_TOLD`` numbers, then tokens by expert [E]."""
        zeros = torch.zeros(len(_TOLD) + self.config.num_moe_experts, dtype=torch.float64)
        return zeros if self._sums is None or not self._counts else self._sums.cpu()

    @property
    def _counts(self) -> bool:
        """Whether this rank has positions of its own: without sequence parallelism, all tp ranks have the same."""
        return bool(self.config.sequence_parallel) or dist.get_rank(self.tp_group) == 0

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the experts' weights and the chosen experts, both [T, E], for logits [S, B, E]."""
        assert padding_mask is None, "sequences_BS says what is padding"
        weights_TE, chosen_TE = super().routing(logits)
        # Once a micro-batch: a layer that is computed again has no gradient the first time.
        if not (self.training and torch.is_grad_enabled()):
            return weights_TE, chosen_TE
        has_losses = self.losses != RouterLosses()
        with torch.set_grad_enabled(has_losses):
            logits_TE = logits.flatten(0, 1).float()
            scores_TE = _scores(logits_TE, self.score_function)
        sequence_T = self._own_sequence_T(len(logits_TE))
        terms_2 = logits_TE.new_zeros(2)
        if has_losses:
            terms_2 = self._loss_terms(logits_TE, scores_TE, sequence_T)
            loss = self.losses.load_balance * terms_2[0] + self.losses.z * terms_2[1]
            weights_TE = MoEAuxLossAutoScaler.apply(weights_TE, loss)
        self._record(scores_TE.detach(), chosen_TE, sequence_T > 0, terms_2.detach())
        return weights_TE, chosen_TE

    def _own_sequence_T(self, count: int) -> Tensor:
        """Return the sequence of each of this rank's positions, in the order of the hidden states [S, B].

        Megatron splits the mask over sequence-parallel ranks on the first pipeline stage and on no other.
        """
        assert self.sequences_BS is not None
        sequence_T = self.sequences_BS.t().flatten()
        if len(sequence_T) > count:
            sequence_T = sequence_T.chunk(dist.get_world_size(self.tp_group))[dist.get_rank(self.tp_group)]
        return sequence_T

    def _loss_terms(self, logits_TE: Tensor, scores_TE: Tensor, sequence_T: Tensor) -> Tensor:
        """Return this rank's part of the load-balancing loss and of the z-loss, before their coefficients.

        Load balancing (Switch Transformer, arXiv:2101.03961; by sequence, DeepSeek-V3, arXiv:2412.19437): of a sequence
        with n tokens E sum_e f_e P_e, f_e being the share of its n k choices that fell on expert e, and P_e the mean
        score of e. It is 1 where all experts get the same. z-loss (ST-MoE, arXiv:2202.08906): of a sequence the mean of
        (log sum_e exp logit_e)^2. Both are means over the sequences of the mini-batch. Gradients go through P_e alone.
        """
        num_experts, k = scores_TE.shape[-1], self.topk
        top_TE = torch.zeros_like(scores_TE).scatter_(-1, scores_TE.topk(k).indices, 1.0)
        choices_RE = scores_TE.new_zeros(self._sequences.most_in_a_pass + 1, num_experts)
        choices_RE.index_add_(0, sequence_T, top_TE)
        group = self.tp_cp_group if self.config.sequence_parallel else self.cp_group
        dist.all_reduce(choices_RE, group=group)
        tokens_R1 = (choices_RE.sum(-1, keepdim=True) / k).clamp(min=1.0)
        share_R1 = 1.0 / (self._sequences.total * tokens_R1)
        share_R1[0] = 0.0
        factor_RE = num_experts / k * choices_RE / tokens_R1 * share_R1
        balance = (scores_TE * factor_RE[sequence_T]).sum()
        z = (torch.logsumexp(logits_TE, dim=-1).square() * share_R1[sequence_T, 0]).sum()
        return torch.stack([balance, z])

    @torch.no_grad()
    def _record(self, scores_TE: Tensor, chosen_TE: Tensor, is_real_T: Tensor, terms_2: Tensor) -> None:
        """Add this micro-batch to the sums."""
        entropy_T = torch.special.entr(scores_TE).sum(-1)
        load_E = (chosen_TE & is_real_T[:, None]).sum(0)
        told = torch.stack([is_real_T.sum(), (entropy_T * is_real_T).sum()]).double()
        sums = torch.cat([told, terms_2.double(), load_E.double()])
        self._sums = sums if self._sums is None else self._sums + sums


_CARRIER = "padding_mask"
_TOLD = ("tokens", "entropy", "load_balance", "z")


def _scores(logits_TE: Tensor, function: str) -> Tensor:
    """Return the router's distribution over all experts."""
    if function == "softmax":
        return logits_TE.softmax(-1)
    sigmoid_TE = logits_TE.sigmoid()
    return sigmoid_TE / sigmoid_TE.sum(-1, keepdim=True).clamp(min=1e-20)


def sequences_for_routers(sequences: Tensor) -> dict[str, Tensor]:
    """Return the keyword that brings ``sequences`` of a micro-batch to the routers of a chunk.

    Megatron leaves no other way: it hands its padding mask to every layer together with the hidden states, also where
    a layer is computed again while a later micro-batch is on its way. ``tell_routers`` takes it out again.
    """
    return {_CARRIER: sequences}


def tell_routers(model: torch.nn.Module) -> None:
    """Have the routers of a chunk know the sequences of ``sequences_for_routers``.

    With recompute.method=block Megatron hands nothing to the layers that are not computed again: those have what the
    chunk was given.
    """

    own = list(routers([model]))

    def remember(chunk: torch.nn.Module, inputs: Any, keywords: dict[str, Any]) -> None:
        for router in own:
            router.sequences_BS = keywords.get(_CARRIER)

    def hand_over(layer: MoELayer, inputs: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if keywords[_CARRIER] is not None:
            layer.router.sequences_BS = keywords[_CARRIER]
        return inputs, keywords | {_CARRIER: None}

    model.register_forward_pre_hook(remember, with_kwargs=True)
    for module in model.modules():
        if isinstance(module, MoELayer):
            module.register_forward_pre_hook(hand_over, with_kwargs=True)


def routers(chunks: Iterable[torch.nn.Module]) -> Iterator[Router]:
    """Yield the routers of a model."""
    for chunk in chunks:
        yield from (module for module in chunk.modules() if isinstance(module, Router))


def routing_metrics(chunks: Sequence[torch.nn.Module], shape: ModelShape, device: torch.device) -> dict[str, float]:
    """Return metrics of the routing since the start, over all layers and ranks; collective over all ranks.

    load_max, load_min: tokens of the busiest and of the idlest expert of all layers, over the mean of its layer.
    load_entropy: of the share of tokens by expert, over log E, mean of layers: 1 where all get the same.
    router_entropy: of the router's distribution, in nats, mean of tokens and layers. dropped: share of choices that a
    capacity turned down. load_balance_loss, z_loss: before their coefficients, mean of layers.
    """
    table = torch.zeros(shape.num_layers, len(_TOLD) + shape.num_experts, dtype=torch.float64)
    for router in routers(chunks):
        table[router.layer_number - 1] = router.sums()
    table = table.to(device)
    dist.all_reduce(table)
    table = table[[shape.has_experts(layer) for layer in range(shape.num_layers)]].cpu()
    tokens_L, entropy_L, balance_L, z_L = table[:, : len(_TOLD)].unbind(-1)
    load_LE = table[:, len(_TOLD) :]
    share_LE = load_LE / load_LE.sum(-1, keepdim=True)
    even = math.log(shape.num_experts) or 1.0
    metrics = {
        "load_max": share_LE.max() * shape.num_experts,
        "load_min": share_LE.min() * shape.num_experts,
        "load_entropy": torch.special.entr(share_LE).sum(-1).mean() / even,
        "router_entropy": (entropy_L / tokens_L).mean(),
        "dropped": 1 - load_LE.sum() / (shape.experts_per_token * tokens_L.sum()),
        "load_balance_loss": balance_L.mean(),
        "z_loss": z_L.mean(),
    }
    return {f"moe/{name}": float(value) for name, value in metrics.items()}
