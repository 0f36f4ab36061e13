"""How an engine in processes of its own takes the weights of a publication from the memory of the trainer's ranks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megarl.errors import PublishError
from megarl.parallel.layout import EngineLayout, Layout
from megarl.rollout.engine import RolloutEngine
from megarl.rollout.served import Take
from megarl.weights.engine_parameters import EngineParameters
from megarl.weights.model_shape import ModelShape
from megarl.weights.name_map import hf_shapes
from megarl.weights.shared import SharedReader
from megarl.weights.shared_plan import reader_plan


class WeightsTaker:
    """Takes publications into one rank of an engine. shape, layout: of the actor, on its ranks.
    split: of the engine.

    Raises PublishError where the engine's parameters aren't those of the name map.
    """

    def __init__(
        self, engine: RolloutEngine, shape: ModelShape, layout: Layout, split: EngineLayout, tp_rank: int
    ) -> None:
        self.engine, self.shape = engine, shape
        parameters = engine.parameters()
        dtype = next(iter(parameters.values())).dtype
        self.whole: WholeTensors | None = None
        if shape.is_mapped:
            self.of_engine = EngineParameters(parameters, shape, split, tp_rank)
            self.reader = SharedReader(reader_plan(shape, layout, split, tp_rank, dtype.itemsize), dtype)
        else:
            self.whole = WholeTensors(shape, layout, split, dtype)
            self.reader = self.whole.reader

    def take(self, order: Take) -> None:
        """Copy the weights, and stamp later tokens with their number.

        Raises PublishError where they aren't all of that publication, before the first is copied or after the last, or
        where it brings checksums that aren't theirs.
        """
        self.reader.check(order.segments, order.policy_version)
        if self.whole is None:
            targets = self.of_engine.by_name(self.engine.parameters())
            self.reader.read(order.segments, 0, targets)
            self.reader.verify(order.segments, 0, targets)
        else:
            filled = self.engine.load_weights(t for bucket in self.whole.buckets(order) for t in bucket.items())
            missing = sorted(set(self.engine.parameters()) - filled)
            if missing:
                raise PublishError(
                    f"the engine has parameters that no tensor of {self.shape.family} went into: {missing[:4]}"
                )
        self.reader.check(order.segments, order.policy_version)
        self.engine.publish_done(order.policy_version)


class WholeTensors:
    """The tensors of a publication by the names of a checkpoint, whole, a few at a time."""

    def __init__(self, shape: ModelShape, layout: Layout, split: EngineLayout, dtype: torch.dtype) -> None:
        self.shapes, self.dtype = hf_shapes(shape), dtype
        self.reader = SharedReader(reader_plan(shape, layout, split, 0, dtype.itemsize, whole=True), dtype)

    def check(self, order: Take) -> None:
        """Raise PublishError unless the trainer's memory holds that publication."""
        self.reader.check(order.segments, order.policy_version)

    def buckets(self, order: Take) -> Iterator[dict[str, Tensor]]:
        """Yield all tensors, as many at a time as are read together."""
        for index, names in enumerate(self.reader.plan.names):
            tensors = {name: torch.empty(self.shapes[name], dtype=self.dtype) for name in names}
            self.reader.read(order.segments, index, tensors)
            self.reader.verify(order.segments, index, tensors)
            yield tensors
