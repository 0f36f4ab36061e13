"""A Megatron model in its own process groups, and the pipelined pass over micro-batches that every role shares.

Shape suffixes: B rollouts, S sequence, N predicted tokens that count, V this rank's slice of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megarl.config.model_shape import ModelShape
from megarl.data.batch import MicroBatch, pack
from megarl.model.attention import describe_packing
from megarl.model.build import build_model, load_weights, named_parameters
from megarl.model.weights import TensorSource
from megarl.parallel.groups import ParallelGroups
from megarl.parallel.layout import Layout
from megarl.parallel.vocab import vocab_parallel_logprobs
from megarl.types import Batch

R = TypeVar("R")


@dataclass(frozen=True)
class ModelSpec:
    """What a role's model is. packed: compute no padding tokens."""

    shape: ModelShape
    layout: Layout
    dtype: torch.dtype
    device: torch.device
    packed: bool = True


@dataclass(frozen=True)
class TokenScores:
    """Of every predicted token that counts: its log-prob, and the entropy of the distribution it was drawn from."""

    logprobs_N: Tensor
    entropy_N: Tensor


Loss = Callable[[MicroBatch, TokenScores], tuple[Tensor, R]]


class Model:
    """This rank's part of a role's model. Creating it and every method are collective over all ranks."""

    def __init__(self, spec: ModelSpec, source: TensorSource) -> None:
        self.spec = spec
        self.groups = ParallelGroups(spec.layout)
        self.rank = dist.get_rank()
        with self.groups.active():
            self.module = build_model(spec.shape, self.groups, spec.dtype, spec.device)
            load_weights(self.module, spec.shape, spec.layout, self.rank, source)

    def parameters(self) -> dict[str, Tensor]:
        """Return this rank's parameters by the name map's names."""
        return named_parameters(self.module, self.spec.shape, self.spec.layout, self.rank)

    def logprobs(self, batch: Batch, micro_batches: Sequence[Sequence[int]], temperature: float) -> Tensor | None:
        """Return log-probs [B, S] of the masked tokens on the ranks that report results, else None.

        They are of softmax(logits / temperature), the distribution that the engine samples from.
        """

        def keep(micro: MicroBatch, scores: TokenScores) -> tuple[Tensor, tuple[MicroBatch, Tensor]]:
            return scores.logprobs_N.sum(), (micro, scores.logprobs_N)

        self.module.eval()
        with torch.no_grad():
            results = self.run(batch, micro_batches, keep, temperature=temperature, forward_only=True)
        if not self.groups.is_output_rank:
            return None
        logprobs_BS = torch.zeros(batch.tokens_BS.shape)
        for micro, logprobs_N in results:
            logprobs_BS[micro.row_N, micro.column_N] = logprobs_N.cpu()
        return logprobs_BS

    def run(
        self,
        batch: Batch,
        micro_batches: Sequence[Sequence[int]],
        loss: Loss[R],
        *,
        temperature: float = 1.0,
        forward_only: bool,
    ) -> list[R]:
        """Run Megatron's pipeline schedule over micro-batches; return what ``loss`` told of each, on the last stage.

        Every rank of the layout's data-parallel rank must be given the same rows.
        """
        multiple = self.spec.layout.tp if self.spec.layout.sequence_parallel else 1
        micros = [pack(batch, rows, packed=self.spec.packed, multiple=multiple) for rows in micro_batches]
        with self.groups.active():
            results: list[R] = get_forward_backward_func()(
                forward_step_func=partial(self._forward_step, loss, temperature),
                data_iterator=iter(micros),
                model=self.module,
                num_microbatches=len(micros),
                # Shapes travel with the activations (variable_seq_lengths), so these two decide nothing.
                seq_length=micros[0].tokens.shape[1],
                micro_batch_size=1,
                forward_only=forward_only,
            )
        return results

    def _forward_step(
        self, loss: Loss[R], temperature: float, data: Any, module: torch.nn.Module
    ) -> tuple[Tensor, Any]:
        """Run this stage on the next micro-batch, and say how to turn logits into a loss. (Megatron's interface.)"""
        micro: MicroBatch = next(data)
        device = self.spec.device
        packing = describe_packing(list(micro.lengths), device) if micro.lengths else None
        output = module(micro.tokens.to(device), micro.positions.to(device), None, packed_seq_params=packing)
        return output, partial(self._loss, loss, micro, temperature)

    def _loss(self, loss: Loss[R], micro: MicroBatch, temperature: float, logits: Tensor) -> tuple[Tensor, Tensor, R]:
        value, result = loss(micro, self._scores(micro, temperature, logits))
        # Megatron sums the token counts to normalise by; ours are in the loss already.
        return value, torch.tensor(0, dtype=torch.int, device=value.device), result

    def _scores(self, micro: MicroBatch, temperature: float, logits: Tensor) -> TokenScores:
        """Return log-probs and entropies of the tokens that count from this rank's slice of the logits [.., V]."""
        logits_NV = logits.flatten(0, -2)[micro.predict_N.to(logits.device)]
        logprobs_N, entropy_N = vocab_parallel_logprobs(
            logits_NV if temperature == 1.0 else logits_NV / temperature,
            micro.targets_N.to(logits.device),
            group=mpu.get_tensor_model_parallel_group(),
            vocab_size=self.spec.shape.vocab_size,
        )
        return TokenScores(logprobs_N, entropy_N)
