"""Bytes of a role on FSDP: what a rank holds from start to end, and what it gathers in a pass.

Exact where nothing is gathered: torch gives every rank room for as many rows of each parameter as the first has, of
parameters and gradients alike; Adam's moments are of the rows that are there. Real ranks are compared with this in
tests/dist.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cache

from megarl.config.schema import FsdpConfig
from megarl.parallel.layout import Layout
from megarl.plan.sizes import FP32_BYTES, StaticBytes
from megarl.roles import Role
from megarl.weights.adapters import Lora, adapter_shapes
from megarl.weights.fsdp_map import parameter_shapes, rows_of
from megarl.weights.model_shape import ModelShape


@cache
def fsdp_static_bytes(
    shape: ModelShape, layout: Layout, rank: int, *, dtype_bytes: int, trained: bool, lora: Lora | None = None
) -> StaticBytes:
    """Return the bytes that ``rank`` holds of a role.

    dtype_bytes: of a frozen parameter; trained ones are float32. lora: adapters that alone are trained.
    """
    weights = list(parameter_shapes(shape).values())
    steps = trained and lora is None
    found = _static_bytes(weights, layout, rank, FP32_BYTES if steps else dtype_bytes, steps)
    if lora is None:
        return found
    added = _static_bytes(list(adapter_shapes(shape, lora).values()), layout, rank, FP32_BYTES, trained)
    return StaticBytes(found.parameters + added.parameters, added.gradients, added.optimizer)


def _static_bytes(
    sizes: Iterable[Sequence[int]], layout: Layout, rank: int, dtype_bytes: int, trained: bool
) -> StaticBytes:
    """Return the bytes that ``rank`` holds of parameters of these sizes."""
    roomy, real = 0, 0
    for rows, *rest in sizes:
        roomy += len(rows_of(rows, 0, layout.fsdp)) * math.prod(rest)
        real += len(rows_of(rows, rank % layout.fsdp, layout.fsdp)) * math.prod(rest)
    if not trained:
        return StaticBytes(roomy * dtype_bytes)
    return StaticBytes(roomy * dtype_bytes, roomy * FP32_BYTES, real * 2 * FP32_BYTES)


@cache
def _gathered_numel(sizes: tuple[tuple[str, tuple[int, ...]], ...]) -> tuple[int, int]:
    """Return the elements of the largest layer, and of all that is in none, of parameters by name and size."""
    of_layers: dict[str, int] = {}
    outside = 0
    for name, size in sizes:
        layer = next((part for part in name.split(".") if part.isdigit()), None)
        if layer is not None:
            of_layers[layer] = of_layers.get(layer, 0) + math.prod(size)
        else:
            outside += math.prod(size)
    return max(of_layers.values(), default=0), outside


def gathered_bytes(role: Role, *, is_updated: bool) -> int:
    """Return the bytes of the parameters that are gathered at once in a pass, and of what goes with them.

    Gathered are all that are in no layer, the layer at work and the next one; all layers where none is freed. In the
    backward pass each has a gradient, and while it is reduced another in float32.
    """
    if role.layout.fsdp == 1 and role.dtype_bytes == FP32_BYTES:
        return 0
    weights = tuple(parameter_shapes(role.shape).items())
    adapters = tuple(adapter_shapes(role.shape, role.lora).items()) if role.lora else ()
    layer, outside = _gathered_numel(weights + adapters)
    assert isinstance(role.backend, FsdpConfig)
    frees = role.backend.reshard_after_forward
    layers = 2 if frees or not is_updated else role.shape.num_layers
    parameters = (outside + layers * layer) * role.dtype_bytes
    if not is_updated:
        return parameters
    trained = max(_gathered_numel(adapters)) if adapters else max(outside, layer)
    return parameters + trained * (role.dtype_bytes + FP32_BYTES)
