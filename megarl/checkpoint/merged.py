"""The weights of a role whose adapters alone are in a checkpoint: those of its base model, with the adapters merged."""

from __future__ import annotations

import torch
from torch import Tensor

from megarl.checkpoint.role_files import SavedRole
from megarl.weights.adapters import A, B, Lora, adapted_modules, adapter_shapes
from megarl.weights.model_shape import ModelShape
from megarl.weights.sources import TensorSource


class MergedRole:
    """A TensorSource of W + scale * B A in float32 and then in ``dtype``, with W of ``base`` in that dtype, too."""

    def __init__(self, base: TensorSource, saved: SavedRole, shape: ModelShape, lora: Lora, dtype: torch.dtype) -> None:
        self._base, self._saved, self._lora, self._dtype = base, saved, lora, dtype
        self._modules = adapted_modules(shape, lora.targets)

    def read(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) along ``dim`` of the weights of tensor ``name``."""
        rows = self._base.read(name, dim, start, stop).to(self._dtype)
        module = name.removesuffix(".weight")
        if module not in self._modules:
            return rows
        num_rows = self._modules[module][0]
        a, b = (self._saved.read(f"{module}.{part}", 0, 0, n) for part, n in ((A, self._lora.rank), (B, num_rows)))
        merged: Tensor = rows.float() + self._lora.scale * (b @ a).narrow(dim, start, stop - start)
        return merged.to(self._dtype)


def saved_adapters(saved: SavedRole, shape: ModelShape, lora: Lora) -> dict[str, Tensor]:
    """Return every A and B of a checkpoint by its name."""
    return {name: saved.read(name, 0, 0, size[0]) for name, size in adapter_shapes(shape, lora).items()}
