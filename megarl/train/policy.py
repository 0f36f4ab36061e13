"""A model that gives probabilities to tokens: the reference as it stands, the actor with an optimizer on top.

Shape suffixes: B rollouts, S sequence, N predicted tokens that count, M those of this context rank, V this rank's
slice of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.core import parallel_state as mpu
from torch import Tensor

from megarl.data.batch import MicroBatch
from megarl.parallel.vocab import vocab_parallel_logprobs
from megarl.train.model import Model
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
            batch, micro_batches, lambda micro, logits: self.score(micro, logits, temperature).logprobs_N
        )

    def score(self, micro: MicroBatch, logits: Tensor, temperature: float) -> TokenScores:
        """Return log-probs and entropies of the tokens that count from this rank's slice of the logits [.., L, V]."""
        is_own_N = micro.predict_N >= 0
        logprobs_M, entropy_M = vocab_parallel_logprobs(
            logits.flatten(0, -2),
            micro.targets_N[is_own_N].to(logits.device),
            group=mpu.get_tensor_model_parallel_group(),
            vocab_size=self.spec.shape.vocab_size,
            rows_N=micro.predict_N[is_own_N].to(logits.device),
            temperature=temperature,
        )
        return TokenScores(*self.of_all_tokens(micro, logprobs_M, entropy_M))
