"""An optimizer step through the cuda branches, and what it asks of other ranks and of the host."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from megarl.roles import Role
from megarl.train.actor import Actor
from megarl.types import PolicyBatch
from megarl.verify import work
from tests.dist.cuda.fake_world import fake_world
from tests.dist.cuda.meta_device import on_meta

_OF_BUCKETS = ("all_gather_into_tensor",)
_COLLECTIVES = (
    *("all_reduce", "broadcast", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor"),
    *("_all_gather_base", "_reduce_scatter_base", "all_to_all_single", "reduce", "barrier"),
)


@dataclass(frozen=True)
class Collective:
    """One call: its name, the ranks of its group, and the elements of the tensors that it is given."""

    name: str
    ranks: tuple[int, ...]
    numels: tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """What one rank did in an update. reads: of the device by the host, by the way."""

    collectives: tuple[Collective, ...]
    reads: Counter[str]
    metrics: frozenset[str]


def steps(role: Role, batch: PolicyBatch, ranks: Sequence[int]) -> dict[int, Step]:
    """Return what each of ``ranks`` does in an update of ``role``."""
    return {rank: _step(role, batch, rank) for rank in ranks}


def _step(role: Role, batch: PolicyBatch, rank: int) -> Step:
    with fake_world(rank, role.layout.world_size), on_meta() as reads:
        with _recorded(_OF_BUCKETS):  # which meta tensors don't know; the others may exchange objects here
            actor = Actor(work.backend_on_rank(role))
        reads.clear()
        with _recorded(_COLLECTIVES) as collectives:
            (metrics,) = work.update(actor, batch, work.PPO).metrics
        return Step(tuple(collectives), Counter(reads), frozenset(metrics))


@contextmanager
def _recorded(names: Sequence[str]) -> Iterator[list[Collective]]:
    """Yield what collectives are called in the meantime, of which none does anything."""
    called: list[Collective] = []

    def stand_in(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            values = [*args, *kwargs.values()]
            group = next((v for v in values if isinstance(v, dist.ProcessGroup)), dist.group.WORLD)
            numels = tuple(value.numel() for value in values if isinstance(value, Tensor))
            called.append(Collective(name, tuple(dist.get_process_group_ranks(group)), numels))
            return _Done()

        return call

    replaced = {getattr(dist, name): stand_in(name) for name in names}
    replaced[distributed_c10d._coalescing_manager] = lambda *_, **__: contextlib.nullcontext(_Done())
    # Megatron takes some under names of its own.
    modules = [m for n, m in sys.modules.items() if n.startswith(("megatron.core", "torch.distributed", "megarl"))]
    before = [
        (module, name, value)
        for module in modules
        for name, value in list(vars(module).items())
        if callable(value) and value.__hash__ is not None and value in replaced
    ]
    try:
        for module, name, value in before:
            setattr(module, name, replaced[value])
        yield called
    finally:
        for module, name, value in before:
            setattr(module, name, value)


class _Done:
    def wait(self) -> None: ...
