"""The Megatron backend: a role's model, and its optimizer where the role is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from megarl.batching.pack import MicroBatch
from megarl.roles import Role
from megarl.train.backend import Loss, Output, Place, Skipped
from megarl.train.export import export_model
from megarl.train.held_state import Held, SavedState, UpdateCounts
from megarl.train.megatron import optimizer_state
from megarl.train.megatron.model import MegatronModel
from megarl.train.megatron.optimizer import Optimizer
from megarl.train.output import ModelOutput
from megarl.types import Metrics, Sequences
from megarl.weights.name_map import megatron_peers
from megarl.weights.shard import Peers
from megarl.weights.sources import TensorSource

T = TypeVar("T")


class MegatronBackend:
    """This rank's part of a role on Megatron, as ``megarl.train.backend.Backend`` describes it."""

    def __init__(self, role: Role, source: TensorSource, device: torch.device) -> None:
        self.role, self.device = role, device
        self.model = MegatronModel(role, source, device)
        self.place = Place(self.model.groups.place.dp, self.model.groups.is_output_rank)
        self.optimizer = Optimizer(self.model, role) if role.is_trained else None

    def pack(self, sequences: Sequences, micro_batches: Sequence[Sequence[int]]) -> list[MicroBatch]:
        """Lay out micro-batches of rows as this rank computes them; some without rows may follow."""
        return self.model.pack(sequences, micro_batches)

    def forward(self, micros: Sequence[MicroBatch], read: Callable[[MicroBatch, Output], T]) -> list[T]:
        """Return a list of what ``read`` makes of every micro-batch, without gradients; empty but on the last stage."""

        def told(micro: MicroBatch, output: ModelOutput) -> tuple[Tensor, T]:
            return output.tensor.new_zeros(()), read(micro, output)

        self.model.set_training(False)
        with torch.no_grad():
            return self.model.run(micros, told, forward_only=True)

    def step(self, micros: Sequence[MicroBatch], loss: Loss, num_sequences: int) -> Metrics | Skipped:
        """Take one optimizer step on the sum of ``loss`` over micro-batches and data-parallel ranks."""
        return self._trained.step(micros, loss, num_sequences)

    def updating(self) -> AbstractContextManager[None]:
        """Have parameters, gradients and optimizer state on the device for the duration."""
        return self._trained.resident()

    def resident(self) -> AbstractContextManager[None]:
        """Have the parameters on the device for the duration."""
        return self.model.resident()

    def peers(self) -> tuple[Peers, ...]:
        """Return the shards of the role's model on all ranks, as a tuple of Peers."""
        return megatron_peers(self.role.shape, self.role.layout)

    def parameters(self) -> dict[str, Tensor]:
        """Return this rank's parameters by the name map's names. They can be used while they are resident."""
        return self.model.parameters()

    def held(self) -> Iterator[Held]:
        """Yield the Held parts of parameters that this rank's optimizer steps. They can be read while ``updating``."""
        return optimizer_state.held(self._trained)

    def counts(self) -> UpdateCounts:
        """Return the UpdateCounts of the role."""
        return optimizer_state.counts(self._trained)

    def load(self, saved: SavedState, counts: UpdateCounts) -> None:
        """Go on from weights and moments that were saved, and from ``counts``."""
        with self.updating():
            self.model.load(saved)
            optimizer_state.load(self._trained, saved, counts)

    def export(self, out: Path, *, weights: bool = True) -> None:
        """Write ``out`` as a Hugging Face folder, with config and tokenizer files of the folder that it started from.

        weights: whether the weights are in it. Raises ResourceError on every rank where the disk is too small.
        """
        export_model(self, out, weights=weights)

    @property
    def _trained(self) -> Optimizer:
        assert self.optimizer is not None, f"{self.role.name} is frozen"
        return self.optimizer
