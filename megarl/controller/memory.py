"""How far the ranks' devices are used: the memory of every phase beside the plan's, and their speed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megarl.config.schema import PPOConfig, SFTConfig
from megarl.launchers.group import WorkerGroup
from megarl.parallel.environment import platform_name
from megarl.plan.devices import this_device
from megarl.plan.memory import GIB
from megarl.plan.run_plan import plan_run
from megarl.ranks.worker import Worker
from megarl.roles import Role
from megarl.types import Metrics


@dataclass(frozen=True)
class Devices:
    """What is told of the ranks' devices, which is nothing on CPU.

    memory: metrics of a step. flops_per_s: of all together in bfloat16.
    """

    memory: Callable[[], Metrics] = dict
    flops_per_s: float | None = None


def devices_of(config: PPOConfig | SFTConfig, roles: tuple[Role, ...], group: WorkerGroup) -> Devices:
    """Return the Devices of a run on ranks that have started."""
    if platform_name() == "cpu":
        return Devices()
    device = this_device(config.trainer.n_gpus_per_node)
    plan = plan_run(config, roles, device, with_traffic=False)
    planned = {phase.name: phase.device_bytes for phase in plan.phases}
    return Devices(MemoryOnRanks(group, planned).metrics, device.bf16_flops_per_s * group.world_size)


@dataclass(frozen=True)
class MemoryOnRanks:
    """Asks all ranks. planned: bytes on a device, by the plan's names of phases."""

    group: WorkerGroup
    planned: Mapping[str, int]

    def metrics(self) -> Metrics:
        """Return GiB of the ranks that hold most, of every phase since the last time, with the plan's figure."""
        asked = self.group.submit(Worker.memory_used, [None] * self.group.world_size).result()
        found: Metrics = {}
        for phase in dict.fromkeys(name for rank in asked for name in rank):
            most = [rank[phase] for rank in asked if phase in rank]
            prefix = f"memory_gib/{phase.replace(' ', '_')}"
            for name in ("allocated", "reserved", "peak"):
                found[f"{prefix}/{name}"] = max(getattr(memory, name) for memory in most) / GIB
            if phase in self.planned:
                found[f"{prefix}/planned"] = self.planned[phase] / GIB
        return found
