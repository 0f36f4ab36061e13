"""What the ranks of a trainer hold, on any backend."""

from __future__ import annotations

from megarl.parallel.layout import Layout
from megarl.weights.fsdp_map import fsdp_peers
from megarl.weights.model_shape import ModelShape
from megarl.weights.name_map import megatron_peers
from megarl.weights.shard import Peers


def trainer_peers(shape: ModelShape, layout: Layout) -> tuple[Peers, ...]:
    """Return the Peers of a layout, as a tuple."""
    return fsdp_peers(shape, layout) if layout.is_fsdp else megatron_peers(shape, layout)
