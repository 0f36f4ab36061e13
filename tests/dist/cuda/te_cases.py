"""What ranks do in a process whose Megatron has Transformer Engine, and what they hand back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from megarl.parallel.world import leave_world
from megarl.roles import Role
from megarl.train.megatron.backend import MegatronBackend
from megarl.types import PolicyBatch, Sequences
from megarl.verify.work import backend_on_rank
from tests.dist import parity
from tests.dist.cuda.norm_members import members
from tests.dist.cuda.te_kernels import CALLS, seen_as_cuda
from tests.dist.parity import Examined, Job, Trained


@dataclass(frozen=True)
class Built:
    """modules: names of the classes that a model is built of. kernels: emulated ones that were called, how often."""

    modules: frozenset[str]
    kernels: Mapping[str, int]


def examine(role: Role, batch: Sequences) -> tuple[dict[str, Examined], Built]:
    """Score and differentiate ``batch`` on layers of Transformer Engine, packed and padded."""
    with seen_as_cuda():
        CALLS.clear()
        found = parity.examine(role, batch)
        kernels = dict(CALLS)
        return found, Built(_modules(role), kernels)


def train(role: Role, batch: PolicyBatch, jobs: Mapping[str, Job]) -> dict[str, Trained]:
    """Do every job with Transformer Engine's layers and Adam."""
    with seen_as_cuda():
        return parity.train(role, batch, jobs)


def attention_below_9_0(role: Role) -> Built:
    """Return what a model is built of on an A100."""
    with seen_as_cuda((8, 0)):
        return Built(_modules(role), {})


def norm_members(role: Role) -> dict[int, Counter[str]]:
    """Return how many elements of which tensor the norm doesn't count exactly once, by rank of a world not there."""
    leave_world()  # that which every case starts in
    with seen_as_cuda():
        found = members(role)
    return found


def _modules(role: Role) -> frozenset[str]:
    backend = backend_on_rank(role)
    assert isinstance(backend, MegatronBackend)
    return frozenset(type(module).__name__ for chunk in backend.model.chunks for module in chunk.modules())
