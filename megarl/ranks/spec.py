"""What a rank is told to start with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megarl.roles import Role
from megarl.rollout.sglang import SglangSpec
from megarl.rollout.vllm import VllmSpec
from megarl.train.held_state import UpdateCounts


@dataclass(frozen=True)
class Resumed:
    """The checkpoint that ranks go on from, and the updates of each role there."""

    folder: str
    updates: Mapping[str, UpdateCounts]


@dataclass(frozen=True)
class RankSpec:
    """A run as every rank needs to know it, the same on all.

    hang_timeout_s: that a collective may take. engine: None where nothing is generated. is_served: whether it is in
    processes of its own. algorithm_file: the user's own losses. resumed: None at a run's start.
    numa_binding: whether ranks on CUDA run on the cores near their device. Paths are absolute.
    """

    roles: tuple[Role, ...]
    seed: int
    hang_timeout_s: float
    engine: VllmSpec | SglangSpec | None = None
    is_served: bool = False
    algorithm_file: str | None = None
    resumed: Resumed | None = None
    numa_binding: bool = False


@dataclass(frozen=True)
class EngineStart:
    """What every rank of an engine in processes of its own is told to start with.

    actor: whose weights it gets. shares_devices: whether it is on the trainer's, and rests while that trains.
    """

    spec: VllmSpec | SglangSpec
    actor: Role
    shares_devices: bool = False
