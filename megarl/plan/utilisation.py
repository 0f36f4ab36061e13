"""The work of an update, and the share of the devices' matrix speed that it reached (MFU, arXiv:2204.02311)."""

from __future__ import annotations

from collections.abc import Sequence

from megarl.weights.model_shape import ModelShape


def update_flops(shape: ModelShape, lengths: Sequence[int]) -> float:
    """Return the work of a forward and a backward pass over sequences of ``lengths`` tokens.

    6 FLOPs a token for each parameter it passes through, and 6 n^2 x heads x head size a layer for the causal attention
    of a sequence of n tokens; what is computed again doesn't count.
    """
    attention = 6 * shape.num_layers * shape.num_heads * shape.head_dim * sum(length**2 for length in lengths)
    return float(6 * shape.active_parameters * sum(lengths) + attention)
