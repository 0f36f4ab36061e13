"""How an engine in processes of its own takes the weights of a publication from the memory of the trainer's ranks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megarl.errors import PublishError
from megarl.parallel.layout import Layout
from megarl.rollout.engine import RolloutEngine
from megarl.rollout.served import Take
from megarl.weights.engine_parameters import check_parameters
from megarl.weights.model_shape import ModelShape
from megarl.weights.name_map import hf_shapes
from megarl.weights.shared import SharedReader
from megarl.weights.shared_plan import reader_plan


class WeightsTaker:
    """Takes publications into one rank of an engine. shape, layout: of the actor, on its ranks.

    Raises PublishError where the engine's parameters aren't those of the name map.
    """

    def __init__(self, engine: RolloutEngine, shape: ModelShape, layout: Layout, tp: int, tp_rank: int) -> None:
        self.engine, self.shape = engine, shape
        parameters = engine.parameters()
        if shape.is_mapped:
            check_parameters(parameters, shape, tp, tp_rank)
        self.dtype = next(iter(parameters.values())).dtype
        self.reader = SharedReader(reader_plan(shape, layout, tp, tp_rank, self.dtype.itemsize), self.dtype)

    def take(self, order: Take) -> None:
        """Copy the weights, and stamp later tokens with their number.

        Raises PublishError where they aren't all of that publication, before the first is copied or after the last.
        """
        self.reader.check(order.segments, order.policy_version)
        if self.shape.is_mapped:
            self.reader.read(order.segments, 0, self.engine.parameters())
        else:
            filled = self.engine.load_weights(self._tensors(order))
            missing = sorted(set(self.engine.parameters()) - filled)
            if missing:
                raise PublishError(
                    f"the engine has parameters that no tensor of {self.shape.family} went into: {missing[:4]}"
                )
        self.reader.check(order.segments, order.policy_version)
        self.engine.publish_done(order.policy_version)

    def _tensors(self, order: Take) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor, whole; there are as many at a time as are read together."""
        shapes = hf_shapes(self.shape)
        for index, names in enumerate(self.reader.plan.names):
            tensors = {name: torch.empty(shapes[name], dtype=self.dtype) for name in names}
            self.reader.read(order.segments, index, tensors)
            yield from tensors.items()
