"""Which rank holds what: pure arithmetic on the sizes of the parallel axes.

Ranks are numbered as Megatron's default order ``tp-cp-ep-dp-pp`` does: tensor-parallel ranks are neighbours, then
context, then data; pipeline stages are furthest apart.
"""

from __future__ import annotations

from dataclasses import dataclass

from megarl.config.schema import MegatronConfig
from megarl.errors import ConfigError, Problem


@dataclass(frozen=True)
class Coordinates:
    """A rank's place on every axis."""

    tp: int
    dp: int
    pp: int


@dataclass(frozen=True)
class Layout:
    """Sizes of all axes of one model. ``dp`` follows from the others."""

    world_size: int
    tp: int = 1
    pp: int = 1
    sequence_parallel: bool = False

    @property
    def dp(self) -> int:
        """Number of data-parallel replicas."""
        return self.world_size // (self.tp * self.pp)

    def coordinates(self, rank: int) -> Coordinates:
        """Return where ``rank`` stands on each axis."""
        return Coordinates(tp=rank % self.tp, dp=rank // self.tp % self.dp, pp=rank // (self.tp * self.dp) % self.pp)

    def rank(self, place: Coordinates) -> int:
        """Return the rank at ``place``: the inverse of :meth:`coordinates`."""
        return place.tp + self.tp * (place.dp + self.dp * place.pp)

    def output_ranks(self) -> tuple[int, ...]:
        """Return, for every data-parallel rank in order, the rank that reports its results: last stage, tp 0."""
        return tuple(self.rank(Coordinates(tp=0, dp=d, pp=self.pp - 1)) for d in range(self.dp))


def layout_of(megatron: MegatronConfig, world_size: int) -> Layout:
    """Return the layout of a config's axes; sequence parallelism means something only where TP > 1."""
    tp = megatron.tensor_model_parallel_size
    return Layout(world_size, tp, megatron.pipeline_model_parallel_size, megatron.sequence_parallel and tp > 1)


def split_layers(num_layers: int, num_stages: int) -> tuple[range, ...]:
    """Return the global layer indices of every pipeline stage.

    Where ``num_layers`` doesn't divide, the extra layers go to the middle stages first, since the first stage also
    holds the embedding and the last the output layer.

    Raises ConfigError where a stage would be left without a layer.
    """
    if num_layers < num_stages:
        key = "pipeline_model_parallel_size"
        raise ConfigError([Problem(key, num_stages, f"must be at most the model's {num_layers} layers")])
    base, extra = divmod(num_layers, num_stages)
    from_the_middle = sorted(range(num_stages), key=lambda s: (s in (0, num_stages - 1), s == num_stages - 1, s))
    sizes = [base + (stage in from_the_middle[:extra]) for stage in range(num_stages)]
    starts = [sum(sizes[:stage]) for stage in range(num_stages)]
    return tuple(range(start, start + size) for start, size in zip(starts, sizes, strict=True))
