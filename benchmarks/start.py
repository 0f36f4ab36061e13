"""What a start costs one rank, and what the controller sends for it, at 8 to 1,024 ranks that are simulated.

    python benchmarks/start.py [--write]

One process is rank 0 of a world of torch's fake backend, in which collectives do nothing: what is measured is what a
rank works out by itself and what it would have to agree upon, not the wait for others. The actor is Qwen3-235B-A22B
on TP8 x PP4 x EP8, engines are TP16. --write puts the table into docs/performance.md.
"""

from __future__ import annotations

import argparse
import pickle
import time
from dataclasses import dataclass
from typing import Any

from megarl.parallel.environment import apply_environment
from megarl.parallel.platform import install_platform

apply_environment()
install_platform()

import torch.distributed as dist  # noqa: E402
from controller import MODEL, NUM_RANKS, role_on  # noqa: E402
from page import write_measured  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

from megarl.parallel.groups import ParallelGroups  # noqa: E402
from megarl.parallel.layout import Layout  # noqa: E402
from megarl.ranks.spec import RankSpec  # noqa: E402
from megarl.roles import Role  # noqa: E402
from megarl.weights.cells import cells_of  # noqa: E402
from megarl.weights.model_facts.shipped import shipped_config  # noqa: E402
from megarl.weights.model_shape import ModelShape, parse_model_shape  # noqa: E402
from megarl.weights.name_map import megatron_peers, vllm_peers  # noqa: E402
from megarl.weights.reshard_plan import plan_reshard  # noqa: E402

ENGINE_TP, RANKS_PER_NODE = 16, 8
REPETITIONS = 3


@dataclass(frozen=True)
class Start:
    """One rank's start. spec_bytes: what the controller sends it. num_groups: made in the world; own: it is in."""

    spec_bytes: int
    num_groups: int
    num_own: int
    groups_s: float
    planning_s: float


def role_of(num_ranks: int) -> tuple[Role, Layout]:
    """Return the actor of a world, and its layout with experts over eight ranks."""
    role = role_on(num_ranks, 512, 5120)
    return role, Layout(num_ranks, tp=8, pp=role.layout.pp, ep=8, etp=1)


def measured(num_ranks: int, shape: ModelShape) -> Start:
    """Return what rank 0 of so many takes to start."""
    role, layout = role_of(num_ranks)
    num_made, new_group = 0, dist.new_group

    def new_fake_group(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_made
        num_made += 1
        return new_group(*args, **kwargs | {"backend": "fake", "pg_options": None})

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    dist.new_group = new_fake_group  # Megatron asks for gloo's and NCCL's
    try:
        own_before, start_s = len(dist.distributed_c10d._world.pg_map), time.perf_counter()
        ParallelGroups(layout)
        groups_s = time.perf_counter() - start_s
        num_own = len(dist.distributed_c10d._world.pg_map) - own_before
    finally:
        dist.new_group = new_group
        dist.destroy_process_group()
    start_s = time.process_time()
    engine_tp = min(ENGINE_TP, num_ranks)
    plan_reshard(
        cells_of(megatron_peers(shape, layout), RANKS_PER_NODE), vllm_peers(shape, engine_tp, range(num_ranks)), 0
    )
    planning_s = time.process_time() - start_s
    spec_bytes = len(pickle.dumps(RankSpec((role,), seed=0, hang_timeout_s=1800.0)))
    return Start(spec_bytes, num_made, num_own, groups_s, planning_s)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    facts = shipped_config(MODEL)
    assert facts is not None
    shape = parse_model_shape(facts, MODEL)
    lines = [
        "| Ranks | Groups that are made | a rank is in | A rank's work on them, ms | Its plan of a publish, ms | "
        "Sent by the controller, MB |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for num_ranks in NUM_RANKS:
        found = [measured(num_ranks, shape) for _ in range(REPETITIONS)]
        best = min(found, key=lambda start: start.groups_s)
        planning_s = min(start.planning_s for start in found)
        lines.append(
            f"| {num_ranks:,} | {best.num_groups:,} | {best.num_own} | {best.groups_s * 1e3:,.0f} | "
            f"{planning_s * 1e3:,.0f} | {best.spec_bytes * num_ranks / 1e6:,.1f} |"
        )
    print("\n".join(lines))
    if asked.write:
        write_measured("start", "\n".join(lines))


if __name__ == "__main__":
    main()
