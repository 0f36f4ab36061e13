"""The FSDP backend: a role's model, and its optimizer where the role is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from megarl.batching.pack import MicroBatch
from megarl.roles import Role
from megarl.train.backend import Loss, Output, Place, Skipped
from megarl.train.export import export_model
from megarl.train.fsdp.lora import export_adapters
from megarl.train.fsdp.model import FsdpModel
from megarl.train.fsdp.optimizer import Optimizer
from megarl.train.held_state import Held, SavedState, UpdateCounts
from megarl.train.output import ModelOutput
from megarl.types import Metrics, Sequences
from megarl.weights.fsdp_map import fsdp_peers
from megarl.weights.shard import Peers
from megarl.weights.sources import TensorSource

T = TypeVar("T")


class FsdpBackend:
    """This rank's part of a role on FSDP, as ``megarl.train.backend.Backend`` describes it."""

    def __init__(self, role: Role, source: TensorSource, device: torch.device) -> None:
        self.role, self.device = role, device
        self.model = FsdpModel(role, source, device)
        self.place = Place(self.model.place.dp, self.model.place.cp == 0)
        self.optimizer = Optimizer(self.model, role) if role.is_trained else None

    def pack(self, sequences: Sequences, micro_batches: Sequence[Sequence[int]]) -> list[MicroBatch]:
        """Lay out micro-batches of rows as this rank computes them."""
        return self.model.pack(sequences, micro_batches)

    def forward(self, micros: Sequence[MicroBatch], read: Callable[[MicroBatch, Output], T]) -> list[T]:
        """Return a list of what ``read`` makes of every micro-batch, without gradients."""

        def told(micro: MicroBatch, output: ModelOutput) -> tuple[Tensor, T]:
            return output.tensor.new_zeros(()), read(micro, output)

        with torch.no_grad():
            return self.model.run(micros, told, forward_only=True)

    def step(self, micros: Sequence[MicroBatch], loss: Loss, num_sequences: int) -> Metrics | Skipped:
        """Take one optimizer step on the sum of ``loss`` over micro-batches and data-parallel ranks."""
        return self._trained.step(micros, loss)

    def updating(self) -> AbstractContextManager[None]:
        """Have parameters and optimizer state on the device for the duration."""
        return self._trained.resident()

    def resident(self) -> AbstractContextManager[None]:
        """Have the parameters on the device for the duration."""
        return self.model.resident()

    def peers(self) -> tuple[Peers, ...]:
        """Return the shards of the role's model on all ranks, as a tuple of Peers."""
        return fsdp_peers(self.role.shape, self.role.layout)

    def parameters(self) -> Mapping[str, Tensor]:
        """Return this rank's parameters by the name map's names, adapters merged. They can be used while resident."""
        return self.model.parameters()

    def held(self) -> Iterator[Held]:
        """Yield the Held parts of parameters that this rank's optimizer steps. They can be read while ``updating``."""
        return self._trained.held()

    def counts(self) -> UpdateCounts:
        """Return the UpdateCounts of the role."""
        return self._trained.counts()

    def load(self, saved: SavedState, counts: UpdateCounts) -> None:
        """Go on from weights and moments that were saved, and from ``counts``."""
        with self.updating():
            self._trained.load(saved, counts)

    def export(self, out: Path, *, weights: bool = True) -> None:
        """Write ``out`` as a Hugging Face folder, with config and tokenizer files of the folder that it started from.

        weights: whether the weights are in it, adapters merged, and besides in the folder ``adapter``. Raises
        ResourceError on every rank where the disk is too small.
        """
        export_model(self, out, weights=weights)
        if self.role.lora and weights:
            with self.resident():
                export_adapters(self.model.root.model, self.role, out / "adapter")

    @property
    def _trained(self) -> Optimizer:
        assert self.optimizer is not None, f"{self.role.name} is frozen"
        return self.optimizer
