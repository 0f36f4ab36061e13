"""This rank's part of a role's model on FSDP, and the pass over micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from megarl.batching.pack import MicroBatch, pack
from megarl.roles import Role
from megarl.train.attention import packing_of
from megarl.train.fsdp.attention import Attending
from megarl.train.fsdp.build import base_parts, build_root, load_weights, named_parameters, sharded_modules
from megarl.train.fsdp.lora import adapter_parts
from megarl.train.fsdp.mesh import ranks_of
from megarl.train.offload import Offload
from megarl.train.output import ModelOutput
from megarl.types import Sequences
from megarl.weights.fsdp_map import fsdp_shards
from megarl.weights.shard import Shard
from megarl.weights.sources import TensorSource

R = TypeVar("R")

# Turns a micro-batch and its output into a loss, and whatever the caller wants to keep.
Told = Callable[[MicroBatch, ModelOutput], tuple[Tensor, R]]


class FsdpModel:
    """This rank's part of a role's model. Creating it and every method are collective over all ranks."""

    def __init__(self, role: Role, source: TensorSource, device: torch.device) -> None:
        self.role, self.device = role, device
        self.rank = dist.get_rank()
        self.place = role.layout.coordinates(self.rank)
        self.ranks = ranks_of(role.layout, device)
        self.root = build_root(role, self.ranks, device)
        self._offload = Offload(self._local_parameters, enabled=role.residency.param_offload)
        with self.resident():
            load_weights(self.root, role, self.rank, source)

    def own_parameters(self) -> Iterator[torch.nn.Parameter]:
        """Return an iterator over the parameters, each of which is a DTensor between passes."""
        return self.root.parameters()

    def _local_parameters(self) -> Iterator[Tensor]:
        """Yield this rank's part of every parameter."""
        for parameter in self.own_parameters():
            assert isinstance(parameter, DTensor)
            yield parameter.to_local()

    def resident(self) -> AbstractContextManager[None]:
        """Have the parameters on the device for the duration: whoever reads or writes them does it in here."""
        return self._offload.resident()

    def parameters(self) -> Mapping[str, Tensor]:
        """Return this rank's parameters by the name map's names, adapters merged. They can be used while resident."""
        assert not self._offload.is_away
        return named_parameters(self.root, self.role, self.rank)

    def parts(self, of: Callable[[Tensor], Tensor]) -> Iterator[tuple[Shard, Tensor]]:
        """Yield this rank's part of what there is ``of`` every parameter that is trained, with its shard."""
        assert not self._offload.is_away
        if self.role.lora:
            yield from adapter_parts(self.root.model, self.rank % self.role.layout.fsdp, self.role.layout.fsdp, of)
            return
        found = base_parts(self.root, self.role, self.rank, of)
        for shard in fsdp_shards(self.role.shape, self.role.layout, self.rank):
            yield shard, found[shard.name]

    def pack(self, sequences: Sequences, micro_batches: Sequence[Sequence[int]]) -> list[MicroBatch]:
        """Lay out micro-batches of rows as this rank computes them."""
        cp, cp_rank = self.role.layout.cp, self.place.cp
        return [
            pack(sequences, rows, packed=self.role.packed, cp=cp, cp_rank=cp_rank, contiguous=True)
            for rows in micro_batches
        ]

    def run(self, micros: Sequence[MicroBatch], told: Told[R], *, forward_only: bool) -> list[R]:
        """Return what ``told`` told of each micro-batch; add up gradients unless ``forward_only``.

        Between passes no parameter is gathered: after a forward pass alone FSDP would leave the root's so.
        """
        self.root.train(not forward_only)
        results = []
        with self.resident():
            for number, micro in enumerate(micros, start=1):
                # Copies of the model hear of each other's gradients once.
                next(sharded_modules(self.root)).set_requires_all_reduce(number == len(micros))
                loss, result = self.root(partial(self._read, told, micro), **self._inputs(micro))
                if not forward_only:
                    loss.backward()
                results.append(result)
            for module in sharded_modules(self.root):
                module.reshard()
        return results

    def _inputs(self, micro: MicroBatch) -> dict[str, Any]:
        """Return the arguments that transformers' model is given of a micro-batch, by name."""
        inputs: dict[str, Any] = {"input_ids": micro.tokens.to(self.device), "use_cache": False}
        if self.role.shape.own_attention:  # over lines of one sequence each, whose positions go without saying
            return inputs
        packing = packing_of(micro.lengths, self.device) if micro.lengths else None
        inputs |= {
            "position_ids": micro.positions.to(self.device),
            "attending": Attending(packing, self.ranks.context),
        }
        if self._keeps_predictions:
            inputs["logits_to_keep"] = micro.predict_N[micro.predict_N >= 0].to(self.device)
        return inputs

    @property
    def _keeps_predictions(self) -> bool:
        """Whether logits are computed only where they predict a token that counts."""
        return self.role.packed and not self.role.shape.value_head and not self.role.fused_head

    def _read(self, told: Told[R], micro: MicroBatch, output: Tensor) -> tuple[Tensor, R]:
        weight = self.root.model.get_output_embeddings().weight if self.role.fused_head else None
        return told(
            micro,
            ModelOutput(
                micro,
                output,
                self.role.shape.vocab_size,
                context_ranks=self.ranks.context,
                head_weight=weight,
                at_predictions=self._keeps_predictions,
            ),
        )
