"""What vLLM's parameters must be for rows to be written into them in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from megarl.errors import PublishError
from megarl.parallel.layout import EngineLayout
from megarl.weights.model_shape import ModelShape
from megarl.weights.name_map import vllm_patterns

if TYPE_CHECKING:
    from torch import Tensor


class EngineParameters:
    """The parameters of one rank of an engine as the name map has them: experts apart, which vLLM stacks by layer.

    Raises PublishError where ``parameters`` aren't those of the name map.
    """

    def __init__(self, parameters: Mapping[str, Tensor], shape: ModelShape, engine: EngineLayout, tp_rank: int) -> None:
        expected: dict[str, tuple[int, ...]] = {}
        self._slices: dict[str, tuple[str, int]] = {}
        for pattern in vllm_patterns(shape, engine, tp_rank):
            stack, _, _ = pattern.shard.name.partition(".{e}")
            is_stacked = stack != pattern.shard.name
            size = (len(pattern.experts), *pattern.shard.shape) if is_stacked else pattern.shard.shape
            for i in pattern.layers:
                expected[stack.format(i=i)] = size
                if is_stacked:
                    for place, e in enumerate(pattern.experts):
                        self._slices[pattern.shard.name.format(i=i, e=e)] = (stack.format(i=i), place)
        found = {(name, tuple(parameter.shape)) for name, parameter in parameters.items()}
        odd = sorted(found ^ set(expected.items()))
        if odd:
            raise PublishError(f"the engine's parameters and the name map disagree on its rank {tp_rank}: {odd[:4]}")

    def by_name(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the parameters by the names of the map, to be written in place."""
        return {**parameters, **{name: parameters[stack][place] for name, (stack, place) in self._slices.items()}}
