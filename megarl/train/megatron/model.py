"""This rank's part of a role's Megatron model in its own process groups, and the pipelined pass over micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import chain
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megarl.batching.pack import MicroBatch, pack
from megarl.config.schema import MegatronConfig, TrainedMegatronConfig
from megarl.parallel.groups import ParallelGroups
from megarl.parallel.layout import Layout
from megarl.roles import Role
from megarl.train.megatron.attention import PackedSequences, describe_packing
from megarl.train.megatron.build import (
    attends_itself,
    build_model,
    load_weights,
    named_parameters,
    output_weight,
    unwrap,
)
from megarl.train.megatron.router import sequences_for_routers
from megarl.train.offload import Offload
from megarl.train.output import ModelOutput
from megarl.types import Sequences
from megarl.weights.sources import TensorSource

R = TypeVar("R")

# Turns a micro-batch and its output into a loss, and whatever the caller wants to keep.
Told = Callable[[MicroBatch, ModelOutput], tuple[Tensor, R]]

_groups: WeakValueDictionary[tuple[dist.ProcessGroup | None, Layout], ParallelGroups] = WeakValueDictionary()


def shared_groups(layout: Layout) -> ParallelGroups:
    """Return the groups of ``layout`` in this world: roles that are laid out alike take turns with the same ones."""
    key = (dist.group.WORLD, layout)
    groups = _groups.get(key)
    if groups is None:
        groups = _groups[key] = ParallelGroups(layout)
    return groups


class MegatronModel:
    """This rank's part of a role's model. Creating it and every method are collective over all ranks.

    chunks: the pieces of this rank's pipeline stage that take turns, in order: one without virtual stages.
    """

    def __init__(self, role: Role, source: TensorSource, device: torch.device) -> None:
        assert isinstance(role.backend, MegatronConfig)
        self.role, self.device = role, device
        self.shape, self.layout, self.dtype = role.shape, role.layout, getattr(torch, role.dtype)
        self.groups = shared_groups(role.layout)
        self.rank = dist.get_rank()
        self._offload = Offload(self.own_parameters, enabled=role.residency.param_offload)
        with self.resident(), self.groups.active():
            self.chunks = build_model(
                self.shape,
                self.groups,
                self.dtype,
                device,
                recompute=role.backend.recompute if isinstance(role.backend, TrainedMegatronConfig) else None,
                overrides=role.backend.override_transformer_config,
                fused_head=role.fused_head,
            )
            self.load(source)

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
        named = named_parameters(self.chunks, self.shape, self.layout, self.rank)
        return {name: parameter.data for name, parameter in named.items()}

    def load(self, source: TensorSource) -> None:
        """Fill the parameters from ``source``, while they are resident."""
        load_weights(self.chunks, self.shape, self.layout, self.rank, source)

    def pack(self, sequences: Sequences, micro_batches: Sequence[Sequence[int]]) -> list[MicroBatch]:
        """Lay out micro-batches of rows as this rank computes them.

        Where chunks take turns, the schedule needs a multiple of the stages: micro-batches without rows make up for
        what is missing.
        """
        layout = self.layout
        missing = -len(micro_batches) % layout.pp if layout.vpp > 1 else 0
        return [
            pack(
                sequences,
                rows,
                packed=self.role.packed,
                multiple=layout.tp if layout.sequence_parallel else 1,
                cp=layout.cp,
                cp_rank=self.groups.place.cp,
            )
            for rows in (*micro_batches, *[()] * missing)
        ]

    def run(self, micros: Sequence[MicroBatch], told: Told[R], *, forward_only: bool) -> list[R]:
        """Run Megatron's pipeline schedule; return what ``told`` told of each micro-batch, on the last stage.

        Every rank of the layout's data-parallel rank must be given the same rows.
        """
        with self.resident(), self.groups.active():
            results: list[R] = get_forward_backward_func()(
                forward_step_func=partial(self._forward_step, told),
                data_iterator=[iter(micros) for _ in self.chunks] if self.layout.vpp > 1 else iter(micros),
                model=self.chunks if self.layout.vpp > 1 else self.module,
                num_microbatches=len(micros),
                # Shapes travel with the activations (variable_seq_lengths), so these two decide nothing.
                seq_length=micros[0].tokens.shape[1],
                micro_batch_size=1,
                forward_only=forward_only,
            )
        return results

    def forward(self, chunk: torch.nn.Module, micro: MicroBatch) -> Tensor:
        """Return the output of a chunk of this stage for a micro-batch, and for the activations it was handed."""
        positions = micro.positions.to(self.device)
        packing = self._packing(micro, positions[0]) if micro.lengths else None
        for_routers = sequences_for_routers(micro.sequences.to(self.device)) if self.shape.num_experts else {}
        output: Tensor = chunk(
            micro.tokens.to(self.device),
            positions,
            None,
            packed_seq_params=packing,
            **for_routers,
        )
        return output

    def _packing(self, micro: MicroBatch, positions_T: Tensor) -> PackedSequences:
        """Return the description of a packed micro-batch that the layers of this model want."""
        own_attention, is_rope_fused = attends_itself(self.dtype), unwrap(self.chunks[0]).config.apply_rope_fusion
        return describe_packing(
            list(micro.lengths),
            self.device,
            self.layout.cp,
            self.groups.place.cp,
            positions_T=positions_T if own_attention and not is_rope_fused else None,
            own_attention=own_attention,
        )

    def output(self, micro: MicroBatch, tensor: Tensor) -> ModelOutput:
        """Return the ModelOutput of the last chunk for a micro-batch, over the groups that are active."""
        return ModelOutput(
            micro,
            tensor,
            self.shape.vocab_size,
            mpu.get_tensor_model_parallel_group(),
            mpu.get_context_parallel_group() if self.layout.cp > 1 else None,
            output_weight(self.chunks[-1]) if self.role.fused_head else None,
        )

    def _forward_step(self, told: Told[R], data: Any, chunk: torch.nn.Module) -> tuple[Tensor, Any]:
        """Run this stage on the next micro-batch and say how to turn its output into a loss, as Megatron wants it."""
        micro: MicroBatch = next(data)
        return self.forward(chunk, micro), partial(self._with_token_count, told, micro)

    def _with_token_count(self, told: Told[R], micro: MicroBatch, output: Tensor) -> tuple[Tensor, Tensor, R]:
        """Answer as Megatron's schedule wants. It sums the counts to normalise by; ours are in the loss already."""
        value, result = told(micro, self.output(micro, output))
        return value, torch.tensor(0, dtype=torch.int, device=value.device), result
