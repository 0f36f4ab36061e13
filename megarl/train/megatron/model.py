"""A Megatron model in its own process groups, and the pipelined pass over micro-batches that every role shares.

Shape suffixes: B rollouts, S sequence, N predicted tokens of a micro-batch that count, P places of any kind in it, M
those of them that one context rank has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor

from megarl.batching.pack import MicroBatch, pack
from megarl.config.schema import RecomputeConfig
from megarl.parallel.groups import ParallelGroups
from megarl.parallel.layout import Layout
from megarl.train.megatron.attention import describe_packing
from megarl.train.megatron.build import build_model, load_weights, named_parameters
from megarl.train.offload import Offload
from megarl.types import Batch
from megarl.weights.hf_export import export_hf
from megarl.weights.model_shape import ModelShape
from megarl.weights.name_map import hf_shapes, hf_zeros, megatron_peers
from megarl.weights.sources import TensorSource

R = TypeVar("R")

# Turns a micro-batch and the last stage's output [.., L, width], be it logits, values or hidden states, into a loss and
# whatever the caller wants to keep.
Loss = Callable[[MicroBatch, Tensor], tuple[Tensor, R]]


@dataclass(frozen=True)
class ModelSpec:
    """What a role's model is.

    packed: compute no padding tokens. param_offload: keep parameters in host memory between uses. recompute: None
    keeps all activations. fused_head: compute logits together with their log-probs, and keep none.
    transformer_fields: of Megatron's TransformerConfig, over ours.
    """

    shape: ModelShape
    layout: Layout
    dtype: torch.dtype
    device: torch.device
    packed: bool = True
    param_offload: bool = False
    recompute: RecomputeConfig | None = None
    fused_head: bool = False
    transformer_fields: Mapping[str, Any] = field(default_factory=dict)


_groups: WeakValueDictionary[tuple[dist.ProcessGroup | None, Layout], ParallelGroups] = WeakValueDictionary()


def shared_groups(layout: Layout) -> ParallelGroups:
    """Return the groups of ``layout`` in this world: roles that are laid out alike take turns with the same ones."""
    key = (dist.group.WORLD, layout)
    groups = _groups.get(key)
    if groups is None:
        groups = _groups[key] = ParallelGroups(layout)
    return groups


class Model:
    """This rank's part of a role's model. Creating it and every method are collective over all ranks.

    chunks: the pieces of this rank's pipeline stage that take turns, in order: one without virtual stages.
    """

    def __init__(self, spec: ModelSpec, source: TensorSource) -> None:
        self.spec = spec
        self.groups = shared_groups(spec.layout)
        self.rank = dist.get_rank()
        self._offload = Offload(self.own_parameters, enabled=spec.param_offload)
        with self.resident(), self.groups.active():
            self.chunks = build_model(
                spec.shape,
                self.groups,
                spec.dtype,
                spec.device,
                recompute=spec.recompute,
                overrides=spec.transformer_fields,
                fused_head=spec.fused_head,
            )
            load_weights(self.chunks, spec.shape, spec.layout, self.rank, source)

    @property
    def module(self) -> torch.nn.Module:
        """The whole stage, where it is in one piece."""
        (module,) = self.chunks
        return module

    def own_parameters(self) -> Iterator[torch.nn.Parameter]:
        """Return an iterator over the parameters of all chunks."""
        return chain.from_iterable(chunk.parameters() for chunk in self.chunks)

    def set_training(self, is_training: bool) -> None:
        """Have all chunks behave as in training, or not: recomputation only happens there."""
        for chunk in self.chunks:
            chunk.train(is_training)

    def resident(self) -> AbstractContextManager[None]:
        """Have the parameters on the device for the duration: whoever reads or writes them does it in here."""
        return self._offload.resident()

    def parameters(self) -> dict[str, Tensor]:
        """Return this rank's parameters by the name map's names. They can be used while they are resident."""
        assert not self._offload.is_away
        return named_parameters(self.chunks, self.spec.shape, self.spec.layout, self.rank)

    def export(self, out: Path, template: Path) -> None:
        """Write ``out`` as a Hugging Face folder, with config and tokenizer files of the folder ``template``.

        Raises ResourceError on every rank where the disk is too small.
        """
        shape, layout = self.spec.shape, self.spec.layout
        with self.resident():
            export_hf(
                out,
                template=template,
                shapes=hf_shapes(shape),
                sources=megatron_peers(shape, layout),
                parameters=self.parameters(),
                dtype=self.spec.dtype,
                device=self.spec.device,
                zeros=hf_zeros(shape),
                fields=shape.critic_fields() if shape.value_head else {},
            )

    def run(
        self, batch: Batch, micro_batches: Sequence[Sequence[int]], loss: Loss[R], *, forward_only: bool
    ) -> list[R]:
        """Run Megatron's pipeline schedule over micro-batches; return what ``loss`` told of each, on the last stage.

        Every rank of the layout's data-parallel rank must be given the same rows. Where chunks take turns, the schedule
        needs a multiple of the stages: micro-batches without rows make up for what is missing, and ``loss`` sees them.
        """
        layout = self.spec.layout
        missing = -len(micro_batches) % layout.pp if layout.vpp > 1 else 0
        micros = [self.pack(batch, rows) for rows in (*micro_batches, *[()] * missing)]
        with self.resident(), self.groups.active():
            results: list[R] = get_forward_backward_func()(
                forward_step_func=partial(self._forward_step, loss),
                data_iterator=[iter(micros) for _ in self.chunks] if layout.vpp > 1 else iter(micros),
                model=self.chunks if layout.vpp > 1 else self.module,
                num_microbatches=len(micros),
                # Shapes travel with the activations (variable_seq_lengths), so these two decide nothing.
                seq_length=micros[0].tokens.shape[1],
                micro_batch_size=1,
                forward_only=forward_only,
            )
        return results

    def pack(self, batch: Batch, rows: Sequence[int]) -> MicroBatch:
        """Lay out ``rows`` of ``batch`` as this rank computes them."""
        layout = self.spec.layout
        return pack(
            batch,
            rows,
            packed=self.spec.packed,
            multiple=layout.tp if layout.sequence_parallel else 1,
            cp=layout.cp,
            cp_rank=self.groups.place.cp,
        )

    def of_all_ranks(self, place_P: Tensor, *scores: Tensor) -> tuple[Tensor, ...]:
        """Return scores [P] of all places on every context rank, each given [M] for those that this rank has.

        place_P: flat positions, -1 where another context rank has it.

        So every context rank knows the whole loss, whose gradient goes back to this rank's tokens only: over context
        ranks, gradients add up as they do over data-parallel ones.
        """
        if self.spec.layout.cp == 1:
            return scores
        own_M = (place_P >= 0).nonzero()[:, 0].to(scores[0].device)
        all_P = [scores[0].new_zeros(len(place_P)).index_put((own_M,), score_M) for score_M in scores]
        group = mpu.get_context_parallel_group()
        together: Tensor = reduce_from_tensor_model_parallel_region(torch.stack(all_P), group=group)
        return together.unbind()

    def score_tokens(
        self, batch: Batch, micro_batches: Sequence[Sequence[int]], score: Callable[[MicroBatch, Tensor], Tensor]
    ) -> Tensor | None:
        """Return one number for each masked token, as float32 [B, S], on the ranks that report results, else None.

        score: turns a micro-batch and the last stage's output into the numbers [N] of its predicted tokens, of all
        context ranks.
        """
        results = self.score_micro_batches(batch, micro_batches, score)
        if not self.groups.is_output_rank:
            return None
        scores_BS = torch.zeros(batch.tokens_BS.shape)
        for micro, scores_N in results:
            scores_BS[micro.row_N, micro.column_N] = scores_N
        return scores_BS

    def score_micro_batches(
        self, batch: Batch, micro_batches: Sequence[Sequence[int]], score: Callable[[MicroBatch, Tensor], Tensor]
    ) -> list[tuple[MicroBatch, Tensor]]:
        """Return each micro-batch with what ``score`` makes of it, on the host; only the last stage has any."""

        def keep(micro: MicroBatch, output: Tensor) -> tuple[Tensor, tuple[MicroBatch, Tensor]]:
            scores = score(micro, output)
            return scores.sum(), (micro, scores)

        self.set_training(False)
        with torch.no_grad():
            results = self.run(batch, micro_batches, keep, forward_only=True)
        return [(micro, scores.cpu()) for micro, scores in results]

    def forward(self, chunk: torch.nn.Module, micro: MicroBatch) -> Tensor:
        """Return what a chunk of this stage makes of a micro-batch, and of the activations it was handed."""
        device, cp, cp_rank = self.spec.device, self.spec.layout.cp, self.groups.place.cp
        packing = describe_packing(list(micro.lengths), device, cp, cp_rank) if micro.lengths else None
        sequences = micro.sequences.to(device) if self.spec.shape.num_experts else None
        output: Tensor = chunk(
            micro.tokens.to(device), micro.positions.to(device), None, packed_seq_params=packing, padding_mask=sequences
        )
        return output

    def _forward_step(self, loss: Loss[R], data: Any, chunk: torch.nn.Module) -> tuple[Tensor, Any]:
        """Run this stage on the next micro-batch and say how to turn its output into a loss, as Megatron wants it."""
        micro: MicroBatch = next(data)
        return self.forward(chunk, micro), partial(_with_token_count, loss, micro)


def _with_token_count(loss: Loss[R], micro: MicroBatch, output: Tensor) -> tuple[Tensor, Tensor, R]:
    """Answer as Megatron's schedule wants. It sums the counts to normalise by; ours are in the loss already."""
    value, result = loss(micro, output)
    return value, torch.tensor(0, dtype=torch.int, device=value.device), result
