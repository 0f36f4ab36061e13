"""A model that gives probabilities to tokens: the reference as it stands, the actor with an optimizer on top.

Shape suffixes: B rollouts, S sequence, N predicted tokens that count, M those of this context rank, L positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from megatron.core import parallel_state as mpu
from torch import Tensor

from megarl.batching.pack import MicroBatch
from megarl.parallel.fused_vocab import fused_vocab_parallel_logprobs
from megarl.parallel.vocab import vocab_parallel_logprobs
from megarl.train.megatron.build import output_weight
from megarl.train.megatron.model import Model
from megarl.types import Batch


@dataclass(frozen=True)
class TokenScores:
    """Of every predicted token that counts: its log-prob, and the entropy of the distribution it was drawn from."""

    logprobs_N: Tensor
    entropy_N: Tensor


class Policy(Model):
    """A frozen policy."""

    def logprobs(self, batch: Batch, micro_batches: Sequence[Sequence[int]], temperature: float) -> Tensor | None:
        """Return log-probs [B, S] of the masked tokens on the ranks that report results, else None.

        They are of softmax(logits / temperature), the distribution that the engine samples from.
        """
        return self.score_tokens(
            batch, micro_batches, lambda micro, output: self.score(micro, output, temperature).logprobs_N
        )

    def score(self, micro: MicroBatch, output: Tensor, temperature: float) -> TokenScores:
        """Return log-probs and entropies of the tokens that count from the last stage's output [.., L, width].

        It is this rank's slice of the logits, or hidden states where the head is fused.
        """
        is_own_N, output_L = micro.predict_N >= 0, output.flatten(0, -2)
        if self.spec.fused_head:
            compute = partial(fused_vocab_parallel_logprobs, output_L, output_weight(self.chunks[-1]))
        else:
            compute = partial(vocab_parallel_logprobs, output_L)
        logprobs_M, entropy_M = compute(
            micro.targets_N[is_own_N].to(output.device),
            group=mpu.get_tensor_model_parallel_group(),
            vocab_size=self.spec.shape.vocab_size,
            rows_N=micro.predict_N[is_own_N].to(output.device),
            temperature=temperature,
        )
        return TokenScores(*self.of_all_ranks(micro.predict_N, logprobs_M, entropy_M))
