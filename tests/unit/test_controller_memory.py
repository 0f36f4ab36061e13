"""What is told of the ranks' devices: memory by phase beside the plan's, and the share of their speed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megarl.algorithm.loss_specs import DemonstrationLossSpec
from megarl.batching.pack import sequences_to_batch
from megarl.controller.memory import MemoryOnRanks
from megarl.controller.role_on_ranks import RoleOnRanks
from megarl.monitor.timing import Stopwatch
from megarl.parallel.layout import Layout
from megarl.parallel.memory import DeviceMemory, MemoryByPhase
from megarl.plan.utilisation import update_flops
from megarl.train.work import Updated
from tests.unit.model_shapes import model_shape
from tests.unit.small_roles import role_on
from tests.unit.stand_ins import PlainRanks

GIB = 2**30


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Return what torch's allocator says of a GPU, to be changed. Its peak is set back as on a GPU."""
    said = {"memory_allocated": 0, "memory_reserved": 0, "max_memory_allocated": 0}

    def answer(name: str) -> Callable[[Any], int]:
        return lambda device: said[name]

    for name in said:
        monkeypatch.setattr(torch.cuda, name, answer(name))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: said.update(max_memory_allocated=0))
    return said


def test_a_phase_has_the_largest_of_its_figures_until_it_is_asked_for(allocator: dict[str, int]) -> None:
    memory = MemoryByPhase(torch.device("cuda", 0))
    allocator["max_memory_allocated"] = 99  # of before
    for allocated, reserved, peak in ((1, 20, 5), (2, 10, 4)):
        with memory.phase("actor update"):
            allocator |= {"memory_allocated": allocated, "memory_reserved": reserved, "max_memory_allocated": peak}
    assert memory.drain() == {"actor update": DeviceMemory(2, 20, 5)}
    assert memory.drain() == {}


def test_there_is_nothing_to_tell_on_cpu() -> None:
    memory = MemoryByPhase(torch.device("cpu"))
    with memory.phase("actor update"):
        pass
    assert memory.drain() == {}


def test_metrics_have_the_rank_with_most_and_the_plans_figure() -> None:
    told = [
        {"actor update": DeviceMemory(GIB, 4 * GIB, 3 * GIB), "generate": DeviceMemory(GIB, GIB, GIB)},
        {"actor update": DeviceMemory(2 * GIB, 3 * GIB, 2 * GIB)},
    ]
    ranks: Any = PlainRanks(2, lambda rank, verb, argument: told[rank])
    assert MemoryOnRanks(ranks, {"actor update": 5 * GIB, "publish": GIB}).metrics() == {
        "memory_gib/actor_update/allocated": 2.0,
        "memory_gib/actor_update/reserved": 4.0,
        "memory_gib/actor_update/peak": 3.0,
        "memory_gib/actor_update/planned": 5.0,
        "memory_gib/generate/allocated": 1.0,
        "memory_gib/generate/reserved": 1.0,
        "memory_gib/generate/peak": 1.0,
    }


def test_an_update_is_six_operations_a_parameter_and_attention_of_all_pairs() -> None:
    shape = model_shape()
    heads = shape.num_layers * shape.num_heads * shape.head_dim
    assert update_flops(shape, [3, 5]) == 6 * shape.active_parameters * 8 + 6 * heads * (9 + 25)


@pytest.mark.parametrize("flops_per_s", [1e9, None])
def test_an_update_tells_its_share_of_the_devices_speed(
    monkeypatch: pytest.MonkeyPatch, flops_per_s: float | None
) -> None:
    clock = iter([100.0, 100.5])
    monkeypatch.setattr("megarl.controller.role_on_ranks.time.perf_counter", lambda: next(clock))
    role = role_on(Layout(1))
    ranks: Any = PlainRanks(1, lambda rank, verb, argument: Updated(({"loss": 1.0},) * len(argument.steps)))
    chats = sequences_to_batch([[1, 2, 3], [1, 2]], [[False, True, True], [False, True]])
    stopwatch = Stopwatch()
    on_ranks = RoleOnRanks(role, ranks, 0, stopwatch, DemonstrationLossSpec(), flops_per_s=flops_per_s)
    metrics = on_ranks.update(chats, 1).metrics
    expected = update_flops(role.shape, [3, 2]) / 0.5 / 1e9
    assert metrics.get("actor/mfu") == (None if flops_per_s is None else pytest.approx(expected))
