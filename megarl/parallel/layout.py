"""Which rank holds what: pure arithmetic on the sizes of the parallel axes.

Ranks are numbered as Megatron's default order ``tp-cp-ep-dp-pp`` does: tensor-parallel ranks are neighbours, then
context, then data; pipeline stages are furthest apart. The experts of a stage are split over the same ranks by axes of
their own: expert-tensor, then expert, then expert-data.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megarl.config.schema import ALL_RANKS, BackendConfig, MegatronConfig
from megarl.errors import ConfigError, Problem


@dataclass(frozen=True)
class Coordinates:
    """A rank's place on every axis."""

    tp: int
    dp: int
    pp: int
    cp: int = 0


@dataclass(frozen=True)
class ExpertCoordinates:
    """A rank's place on the axes that experts are split by. edp: among the ranks that hold the same expert weights."""

    etp: int
    ep: int
    edp: int
    pp: int


@dataclass(frozen=True)
class EngineLayout:
    """How a rollout engine splits a model over its ``tp`` ranks.

    ep: ranks that the experts of a layer are spread over, each whole; 1 where every rank has a part of every expert.
    """

    tp: int = 1
    ep: int = 1

    @property
    def expert_tp(self) -> int:
        """Ranks that share an expert."""
        return self.tp // self.ep


@dataclass(frozen=True)
class Layout:
    """Sizes of all axes of one model. ``dp`` and ``edp`` follow from the others.

    vpp: model chunks of a pipeline stage, 1 without interleaving. etp: tensor-parallel size of experts, None as ``tp``.
    fsdp: ranks in a row that have one copy of the model between them, of every tensor a part; 0 on Megatron.
    """

    world_size: int
    tp: int = 1
    pp: int = 1
    sequence_parallel: bool = False
    cp: int = 1
    ep: int = 1
    etp: int | None = None
    vpp: int = 1
    fsdp: int = 0

    @property
    def is_fsdp(self) -> bool:
        """Whether every rank has a part of each tensor, which is gathered where it is used."""
        return self.fsdp > 0

    @property
    def dp(self) -> int:
        """Number of data-parallel replicas."""
        return self.world_size // (self.tp * self.cp * self.pp)

    @property
    def expert_tp(self) -> int:
        """Ranks that share every expert."""
        return self.tp if self.etp is None else self.etp

    @property
    def edp(self) -> int:
        """Number of ranks that hold the same expert weights."""
        return self.world_size // (self.expert_tp * self.ep * self.pp)

    def coordinates(self, rank: int) -> Coordinates:
        """Return where ``rank`` stands on each axis."""
        tp, rest = rank % self.tp, rank // self.tp
        cp, rest = rest % self.cp, rest // self.cp
        return Coordinates(tp=tp, cp=cp, dp=rest % self.dp, pp=rest // self.dp % self.pp)

    def rank(self, place: Coordinates) -> int:
        """Return the rank at ``place``: the inverse of :meth:`coordinates`."""
        return place.tp + self.tp * (place.cp + self.cp * (place.dp + self.dp * place.pp))

    def expert_coordinates(self, rank: int) -> ExpertCoordinates:
        """Return where ``rank`` stands on each axis of experts."""
        etp, rest = rank % self.expert_tp, rank // self.expert_tp
        ep, rest = rest % self.ep, rest // self.ep
        return ExpertCoordinates(etp=etp, ep=ep, edp=rest % self.edp, pp=rest // self.edp % self.pp)

    def output_ranks(self) -> tuple[int, ...]:
        """Return, for every data-parallel rank in order, the rank that reports its results: last stage, tp and cp 0."""
        return tuple(self.rank(Coordinates(tp=0, dp=d, pp=self.pp - 1)) for d in range(self.dp))


def layout_of(backend: BackendConfig, world_size: int) -> Layout:
    """Return the layout of a backend's section.

    Sequence parallelism means something only where TP > 1, virtual stages where PP > 1.
    """
    if not isinstance(backend, MegatronConfig):
        size = world_size if backend.fsdp_size == ALL_RANKS else backend.fsdp_size
        return Layout(world_size, cp=backend.ulysses_sequence_parallel_size, fsdp=size)
    tp, pp = backend.tensor_model_parallel_size, backend.pipeline_model_parallel_size
    return Layout(
        world_size,
        tp,
        pp,
        backend.sequence_parallel and tp > 1,
        backend.context_parallel_size,
        backend.expert_model_parallel_size,
        backend.expert_tensor_parallel_size,
        backend.virtual_pipeline_model_parallel_size or 1 if pp > 1 else 1,
    )


def without_experts(layout: Layout) -> Layout:
    """Return the layout of a model without experts: their axes split nothing."""
    return replace(layout, ep=1, etp=None)


def layers_of_chunks(num_layers: int, layout: Layout, stage: int) -> tuple[range, ...]:
    """Return the global layer indices of every model chunk of a pipeline stage.

    Chunk ``c`` of stage ``s`` is virtual stage ``c * pp + s``: a micro-batch passes all stages once for each chunk.
    """
    return split_layers(num_layers, layout.pp * layout.vpp)[stage :: layout.pp]


def layers_of_stages(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Return the number of layers of every stage, in order; 0 for some where there are fewer layers than stages.

    Where ``num_layers`` doesn't divide, the extra layers go to the middle stages first, since the first stage also
    holds the embedding and the last the output layer.
    """
    base, extra = divmod(num_layers, num_stages)
    from_the_middle = sorted(range(num_stages), key=lambda s: (s in (0, num_stages - 1), s == num_stages - 1, s))
    return tuple(base + (stage in from_the_middle[:extra]) for stage in range(num_stages))


def split_layers(num_layers: int, num_stages: int) -> tuple[range, ...]:
    """Return the global layer indices of every pipeline stage, of as many layers as layers_of_stages says.

    Raises ConfigError where a stage would be left without a layer.
    """
    if num_layers < num_stages:
        key = "pipeline_model_parallel_size"
        raise ConfigError([Problem(key, num_stages, f"must be at most the model's {num_layers} layers")])
    sizes = layers_of_stages(num_layers, num_stages)
    starts = [sum(sizes[:stage]) for stage in range(num_stages)]
    return tuple(range(start, start + size) for start, size in zip(starts, sizes, strict=True))
