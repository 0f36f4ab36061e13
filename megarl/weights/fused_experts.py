"""Checkpoints that keep the experts of a layer in one tensor, as the models of transformers 5 have them in memory.

``mlp.experts.gate_up_proj`` is [experts, 2 x intermediate, hidden], gate above up, and ``mlp.experts.down_proj`` is
[experts, hidden, intermediate]. transformers writes each expert apart unless it is told to save what it has in memory
(``save_original_format=False``); Mixtral's names are then those of the other families.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass

_NAME = re.compile(
    r"(?P<layer>model\.layers\.\d+\.)(?:mlp|block_sparse_moe)\.(?:experts\.(?P<expert>\d+)\.(?P<part>\w+)|gate)\.weight"
)
_GATE, _DOWN = ("gate_proj", "w1"), ("down_proj", "w2")


@dataclass(frozen=True)
class FusedPart:
    """Where a tensor is: in ``name``, of ``shape``. All of it where expert is None.

    Else those rows of the slice ``expert`` that begin with ``first_row`` and are ``num_rows``.
    """

    name: str
    shape: tuple[int, ...]
    expert: int | None = None
    first_row: int = 0
    num_rows: int = 0

    def rows(self, dim: int, start: int, stop: int) -> tuple[int | slice, ...]:
        """Return the index into the tensor ``name`` of rows [start, stop) along ``dim`` of the part."""
        if self.expert is None:
            return (slice(None),) * dim + (slice(start, stop),)
        if dim == 0:
            return (self.expert, slice(self.first_row + start, self.first_row + stop))
        return (self.expert, slice(self.first_row, self.first_row + self.num_rows), slice(start, stop))


def fused_parts(
    shapes: Mapping[str, tuple[int, ...]], num_experts: int, present: Container[str]
) -> dict[str, FusedPart]:
    """Return where to find those tensors of ``shapes`` that are not ``present``, but in a fused one that is."""
    found = {}
    for name, shape in shapes.items():
        if name not in present and (match := _NAME.fullmatch(name)):
            part = _part(match, shape, num_experts)
            if part.name in present:
                found[name] = part
    return found


def _part(match: re.Match[str], shape: tuple[int, ...], num_experts: int) -> FusedPart:
    if match["expert"] is None:
        return FusedPart(match["layer"] + "mlp.gate.weight", shape)
    experts, expert, (rows, columns) = match["layer"] + "mlp.experts.", int(match["expert"]), shape
    if match["part"] in _DOWN:
        return FusedPart(experts + "down_proj", (num_experts, rows, columns), expert, 0, rows)
    first = 0 if match["part"] in _GATE else rows
    return FusedPart(experts + "gate_up_proj", (num_experts, 2 * rows, columns), expert, first, rows)
