"""What vLLM's parameters must be for rows to be written into them in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from megarl.errors import PublishError
from megarl.weights.model_shape import ModelShape
from megarl.weights.name_map import vllm_patterns

if TYPE_CHECKING:
    from torch import Tensor


def check_parameters(parameters: Mapping[str, Tensor], shape: ModelShape, tp: int, tp_rank: int) -> None:
    """Raise PublishError where the parameters of an engine's rank aren't those of the name map."""
    found = {(name, tuple(parameter.shape)) for name, parameter in parameters.items()}
    odd = sorted(found ^ set(_shapes(shape, tp, tp_rank).items()))
    if odd:
        raise PublishError(f"the engine's parameters and the name map disagree on its rank {tp_rank}: {odd[:4]}")


def _shapes(shape: ModelShape, tp: int, tp_rank: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by name: vLLM stacks the experts of a layer in one, which ``{e}`` counts."""
    shapes: dict[str, tuple[int, ...]] = {}
    for pattern in vllm_patterns(shape, tp, tp_rank):
        name, is_stacked, _ = pattern.shard.name.partition(".{e}")
        size = (len(pattern.experts), *pattern.shard.shape) if is_stacked else pattern.shard.shape
        shapes |= {name.format(i=i): size for i in pattern.layers}
    return shapes
