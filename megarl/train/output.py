"""A model's output for a micro-batch, over however many ranks its vocabulary and sequences are split.

Shape suffixes: N predicted tokens that count, M those of this context rank, P places of any kind, R rows, L positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.batching.pack import MicroBatch
from megarl.parallel.fused_vocab import fused_vocab_parallel_logprobs
from megarl.parallel.vocab import vocab_parallel_logprobs
from megarl.train.backend import TokenScores


@dataclass(frozen=True)
class ModelOutput:
    """What a model made of a micro-batch: ``tensor`` is [.., L, width].

    Its last dim is this rank's slice of the logits, a value, or hidden states where ``head_weight`` is there: that of
    an output layer that is fused with the log-probs. vocab_ranks, context_ranks: that split vocabulary and sequences,
    None where neither is. at_predictions: whether ``tensor`` has the places alone that predict a token that counts.
    Every method is collective over those ranks.
    """

    micro: MicroBatch
    tensor: Tensor
    vocab_size: int
    vocab_ranks: dist.ProcessGroup | None = None
    context_ranks: dist.ProcessGroup | None = None
    head_weight: Tensor | None = None
    at_predictions: bool = False

    @property
    def device(self) -> torch.device:
        """Where the numbers are."""
        return self.tensor.device

    def logprobs(self, temperature: float) -> TokenScores:
        """Return log-probs and entropies under softmax(logits / temperature)."""
        micro, output_L = self.micro, self.tensor.flatten(0, -2)
        is_own_N = micro.predict_N >= 0
        rows_M = micro.predict_N[is_own_N].to(self.device)
        if self.head_weight is not None:
            compute = partial(fused_vocab_parallel_logprobs, output_L, self.head_weight)
        else:
            compute = partial(vocab_parallel_logprobs, output_L)
        logprobs_M, entropy_M = compute(
            micro.targets_N[is_own_N].to(self.device),
            group=self.vocab_ranks,
            vocab_size=self.vocab_size,
            rows_N=torch.arange(len(rows_M), device=self.device) if self.at_predictions else rows_M,
            temperature=temperature,
        )
        return TokenScores(*self._of_all_ranks(micro.predict_N, logprobs_M, entropy_M))

    def values(self) -> Tensor:
        """Return the value head's numbers [N] at the positions that predict a token that counts."""
        return self._at(self.micro.predict_N)

    def scores(self) -> Tensor:
        """Return the value head's numbers [R] at the last token of every row."""
        return self._at(self.micro.last_R)

    def _at(self, place_P: Tensor) -> Tensor:
        own_M = place_P[place_P >= 0].to(self.device)
        (values_P,) = self._of_all_ranks(place_P, self.tensor.flatten()[own_M].float())
        return values_P

    def _of_all_ranks(self, place_P: Tensor, *numbers: Tensor) -> tuple[Tensor, ...]:
        """Return numbers [P] of all places on every context rank, each given [M] for those that this rank has.

        place_P: flat positions, -1 where another context rank has it.

        So every context rank knows the whole loss, whose gradient goes back to this rank's tokens only: over context
        ranks, gradients add up as they do over data-parallel ones.
        """
        if self.context_ranks is None:
            return numbers
        own_M = (place_P >= 0).nonzero()[:, 0].to(self.device)
        all_P = [numbers[0].new_zeros(len(place_P)).index_put((own_M,), number_M) for number_M in numbers]
        add_up: Callable[..., tuple[Tensor, ...]] = _Together.apply
        return add_up(self.context_ranks, *all_P)


class _Together(torch.autograd.Function):
    """Adds up over ranks; gradients are passed on as they are, None where nothing depends on a number."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *numbers: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        total = torch.stack(numbers)
        dist.all_reduce(total, group=group)
        return total.unbind()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *grads
