"""The last stage's output for a micro-batch, over however many ranks its vocabulary and sequences are split.

Shape suffixes: N predicted tokens that count, M those of this context rank, P places of any kind, R rows, L positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor

from megarl.batching.pack import MicroBatch
from megarl.parallel.fused_vocab import fused_vocab_parallel_logprobs
from megarl.parallel.vocab import vocab_parallel_logprobs
from megarl.roles import Role
from megarl.train.backend import TokenScores
from megarl.train.megatron.build import output_weight


@dataclass(frozen=True)
class MegatronOutput:
    """What a role's last chunk made of a micro-batch: ``tensor`` is [.., L, width].

    Its last dim is this rank's slice of the logits, a value, or hidden states where the head is fused. Every method is
    collective over the tensor-parallel and context-parallel ranks.
    """

    micro: MicroBatch
    tensor: Tensor
    role: Role
    chunk: torch.nn.Module

    @property
    def device(self) -> torch.device:
        """Where the numbers are."""
        return self.tensor.device

    def logprobs(self, temperature: float) -> TokenScores:
        """Return log-probs and entropies under softmax(logits / temperature)."""
        micro, output_L = self.micro, self.tensor.flatten(0, -2)
        is_own_N = micro.predict_N >= 0
        if self.role.fused_head:
            compute = partial(fused_vocab_parallel_logprobs, output_L, output_weight(self.chunk))
        else:
            compute = partial(vocab_parallel_logprobs, output_L)
        logprobs_M, entropy_M = compute(
            micro.targets_N[is_own_N].to(self.device),
            group=mpu.get_tensor_model_parallel_group(),
            vocab_size=self.role.shape.vocab_size,
            rows_N=micro.predict_N[is_own_N].to(self.device),
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
        if self.role.layout.cp == 1:
            return numbers
        own_M = (place_P >= 0).nonzero()[:, 0].to(self.device)
        all_P = [numbers[0].new_zeros(len(place_P)).index_put((own_M,), number_M) for number_M in numbers]
        group = mpu.get_context_parallel_group()
        together: Tensor = reduce_from_tensor_model_parallel_region(torch.stack(all_P), group=group)
        return together.unbind()
