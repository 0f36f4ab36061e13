"""Low-rank adapters of a model (LoRA, Hu et al., arXiv:2106.09685): which modules have one, and its tensors. No torch.

An adapted module uses its weight W [out, in] as W + scale * B A, of which A [rank, in] and B [out, rank] are trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megarl.weights.fsdp_map import parameter_shapes
from megarl.weights.model_shape import ModelShape

ALL_LINEAR = "all-linear"
A, B = "lora_A.default.weight", "lora_B.default.weight"
_WEIGHT = ".weight"
_ROUTER = ".mlp.gate"  # transformers has it as a parameter, not as a linear module


@dataclass(frozen=True)
class Lora:
    """The adapters of a role. targets: ends of module names, between dots; or ``all-linear``."""

    rank: int
    alpha: int
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        """What the product of an adapter is multiplied by."""
        return self.alpha / self.rank


def linear_modules(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """Return the sizes [out, in] of every linear module of the layers, by its name in memory; experts are none."""
    found = {}
    for name, size in parameter_shapes(shape).items():
        module = name.removesuffix(_WEIGHT)
        if ".layers." in name and module != name and len(size) == 2 and not module.endswith(_ROUTER):
            found[module] = (size[0], size[1])
    return found


def adapted_modules(shape: ModelShape, targets: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Return the sizes [out, in] of the modules that ``targets`` names, by name in memory."""
    modules = linear_modules(shape)
    if ALL_LINEAR in targets:
        return modules
    return {name: size for name, size in modules.items() if f".{name}".endswith(tuple(f".{t}" for t in targets))}


def adapter_shapes(shape: ModelShape, lora: Lora) -> dict[str, tuple[int, int]]:
    """Return the shape of every A and B by its name in memory."""
    found: dict[str, tuple[int, int]] = {}
    for name, (rows, columns) in adapted_modules(shape, lora.targets).items():
        found |= {f"{name}.{A}": (lora.rank, columns), f"{name}.{B}": (rows, lora.rank)}
    return found
