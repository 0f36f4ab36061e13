"""Which elements of which parameters enter the norm of the gradient, on every rank of a layout, with none there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.roles import Role
from megarl.train.megatron.backend import MegatronBackend
from megarl.train.megatron.optimizer import Optimizer
from megarl.train.megatron.optimizer_state import _stepped
from megarl.verify.work import backend_on_rank
from megarl.weights.name_map import hf_shapes
from tests.dist.cuda.fake_world import fake_world


@dataclass(frozen=True)
class Counted:
    """How often a rank's optimizer counts each element of Hugging Face's tensors, and the ranks that it sums over."""

    of_experts: bool
    ranks: tuple[int, ...]
    times: dict[str, Tensor]


def members(role: Role) -> dict[int, Counter[str]]:
    """Return for every rank how many elements of which tensor its norm doesn't count exactly once."""
    counted = {}
    for rank in range(role.layout.world_size):
        with fake_world(rank, role.layout.world_size):
            backend = backend_on_rank(role)
            assert isinstance(backend, MegatronBackend) and backend.optimizer is not None
            counted[rank] = list(_counted(backend.optimizer))
    return {rank: _missed(role, own, counted) for rank, own in counted.items()}


def _counted(optimizer: Optimizer) -> Iterator[Counted]:
    """Yield what each of Megatron's optimizers on this rank counts, by its own word."""
    held = list(_stepped(optimizer))
    for stepped in held:
        stepped.key().grad = torch.zeros_like(stepped.key())
    for inner in optimizer.inner.chained_optimizers:
        grads = {id(grad) for grad in inner.get_main_grads_for_grad_norm()}
        times: dict[str, Tensor] = {}
        own = [stepped for stepped in held if stepped.optimizer is inner]
        for stepped in own:
            flat = torch.zeros(stepped.parameter.numel(), dtype=torch.int32)
            flat[stepped.start : stepped.stop] = int(id(stepped.key().grad) in grads)
            _spread(stepped, flat.view(stepped.parameter.shape), times, optimizer.model.shape)
        group: Any = inner.get_grad_stats_parallel_group()
        of_experts = any(not getattr(stepped.parameter, "allreduce", True) for stepped in own)
        yield Counted(of_experts, tuple(dist.get_process_group_ranks(group)), times)


def _spread(stepped: Any, counts: Tensor, times: dict[str, Tensor], shape: Any) -> None:
    """Add the counts of a parameter's elements to those of the tensors that it is made of."""
    sizes, shard = hf_shapes(shape), stepped.shard
    parts = counts.split([segment.length for segment in shard.segments], shard.dim)
    for segment, part in zip(shard.segments, parts, strict=True):
        if segment.tensor is not None:
            whole = times.setdefault(segment.tensor, torch.zeros(sizes[segment.tensor], dtype=torch.int32))
            whole.narrow(shard.dim, segment.start, segment.length).add_(part)


def _missed(role: Role, own: list[Counted], counted: dict[int, list[Counted]]) -> Counter[str]:
    total = {name: torch.zeros(size, dtype=torch.int32) for name, size in hf_shapes(role.shape).items()}
    groups = {mine.of_experts: mine.ranks for mine in own}
    for of_experts, ranks in groups.items():
        for other in (other for rank in ranks for other in counted[rank] if other.of_experts == of_experts):
            for name, times in other.times.items():
                total[name] += times
    return Counter({name: int((times != 1).sum()) for name, times in total.items() if (times != 1).any()})
