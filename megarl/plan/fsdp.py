"""Bytes of a role on FSDP: what a rank holds from start to end, and what it gathers in a pass.

Exact where nothing is gathered: torch gives every rank room for as many rows of each parameter as the first has, of
parameters and gradients alike; Adam's moments are of the rows that are there. Real ranks are compared with this in
tests/dist.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from megarl.config.schema import FsdpConfig
from megarl.parallel.layout import Layout
from megarl.plan.fsdp_activations import FsdpPass, computed_again_bytes, fsdp_head_bytes, kept_bytes
from megarl.plan.sizes import FP32_BYTES, StaticBytes
from megarl.roles import Role
from megarl.weights.adapters import Lora, adapter_shapes
from megarl.weights.fsdp_map import parameter_shapes, rows_of
from megarl.weights.model_shape import ModelShape

_Sizes = tuple[tuple[str, tuple[int, ...]], ...]


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
def _gathered_numel(sizes: _Sizes) -> tuple[int, int]:
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
    """Return the bytes of the parameters that are gathered at once in a pass.

    Gathered are all that are in no layer, the layer at work and the next one; all layers where none is freed.
    """
    layer, outside = _gathered_numel(_parameters(role) + _adapters(role))
    assert isinstance(role.backend, FsdpConfig)
    frees = role.backend.reshard_after_forward or not is_updated
    return (outside + (2 if frees else role.shape.num_layers) * layer) * role.dtype_bytes


@dataclass(frozen=True)
class Backward:
    """What a rank has at one moment of a backward pass, in bytes.

    gathered: parameters. gradients: whole ones, in the role's dtype, and copies that are reduced, in float32.
    kept: by the forward pass. again: by a layer that is computed again. work: what nobody keeps.
    """

    gathered: int
    gradients: int
    kept: int = 0
    again: int = 0
    work: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.gathered + self.gradients + self.kept + self.again + self.work


def backward_moments(role: Role, p: FsdpPass, *, layer_work: int, head_work: int) -> tuple[Backward, ...]:
    """Return the moments of a backward pass that may be the fullest: at the head, in a layer, at the end.

    A layer's gradients are reduced when all of them are there, those outside of layers at the end. layer_work,
    head_work: what the backward pass of a layer and of the log-probs need beside.
    """
    assert isinstance(role.backend, FsdpConfig)
    b, shape, kept, head = role.dtype_bytes, role.shape, kept_bytes(p), fsdp_head_bytes(p)
    layer, outside = _gathered_numel(_parameters(role) + _adapters(role))
    gathered = gathered_bytes(role, is_updated=True)
    at_head = (outside + layer) * b if role.backend.reshard_after_forward else gathered
    trained_layer, trained_outside = _gathered_numel(_adapters(role) or _parameters(role))
    head_gradient = 0 if role.lora else b * shape.hidden_size * (1 if shape.value_head else shape.vocab_size)
    in_layer = trained_layer * b + _reduced_bytes(trained_layer, role)
    at_end = trained_outside * b + _reduced_bytes(trained_outside, role)
    return (
        Backward(at_head, head_gradient, kept, work=head_work),
        Backward(gathered, head_gradient + in_layer, kept - head, computed_again_bytes(p), layer_work),
        Backward(outside * b, at_end),
    )


def _reduced_bytes(numel: int, role: Role) -> int:
    """Return the bytes of float32 gradients that are reduced together, and of this rank's part of their sum."""
    return FP32_BYTES * (numel + -(-numel // role.layout.fsdp))


def _parameters(role: Role) -> _Sizes:
    return tuple(parameter_shapes(role.shape).items())


def _adapters(role: Role) -> _Sizes:
    return tuple(adapter_shapes(role.shape, role.lora).items()) if role.lora else ()


@dataclass(frozen=True)
class Exchanged:
    """Bytes that a rank receives or sends in a micro-batch, with those who have the same copy of the model.

    gathered: in a forward pass, and again in a backward pass where layers are freed between. reduced: gradients.
    """

    gathered: int
    gathered_again: int
    reduced: int


def exchanged_bytes(role: Role) -> Exchanged:
    """Return the Exchanged bytes of a rank in a micro-batch: all that others have of each parameter."""
    assert isinstance(role.backend, FsdpConfig)
    of_others = 1 - 1 / role.layout.fsdp
    sizes = _parameters(role) + _adapters(role)
    numel = sum(math.prod(size) for _, size in sizes)
    trained = sum(math.prod(size) for _, size in _adapters(role) or sizes)
    gathered = int(numel * role.dtype_bytes * of_others)
    again = gathered if role.backend.reshard_after_forward else 0
    return Exchanged(gathered, again, int(trained * FP32_BYTES * of_others))


def copies_bytes(role: Role) -> int:
    """Return the bytes of gradients that a rank exchanges with other copies of the model in an optimizer step."""
    copies = role.layout.world_size // role.layout.fsdp
    trained = sum(math.prod(size) for _, size in _adapters(role) or _parameters(role))
    return int(2 * (1 - 1 / copies) * trained * FP32_BYTES / role.layout.fsdp)
