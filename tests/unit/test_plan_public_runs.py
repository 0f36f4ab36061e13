"""The plan's verdict on runs that others published with their hardware and outcome. docs/plan.md shows them.

Sequences are taken as long as the runs allowed, one a micro-batch. ``practice`` is ISEEKYAN/verl_megatron_practice:
grpo_qwen2.5_7b.csv, dapo_moe30b.csv, dapo_moe235b.csv. All of them keep bfloat16 weights with float32 gradients, main
parameters and moments, as megarl does.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from megarl.checks.run import check_ppo
from megarl.plan.devices import device
from megarl.plan.memory import GIB
from megarl.plan.of_run import planned
from megarl.plan.run_plan import RunPlan
from tests.unit.composed_configs import composed_values

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
MEGATRON = f"{ACTOR}.megatron"
FULL = {
    f"{MEGATRON}.recompute.granularity": "full",
    f"{MEGATRON}.recompute.method": "uniform",
    f"{MEGATRON}.recompute.num_layers": 1,
}
SWAP = {f"{MEGATRON}.{name}": True for name in ("param_offload", "grad_offload", "optimizer_offload")}
ON_HOST = {f"{MEGATRON}.{name}": True for name in ("param_offload", "grad_offload", "optimizer_on_host")}
DENSE_7B, DENSE_14B = "Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-14B-Instruct"
DENSE_32B, DENSE_72B = "Qwen/Qwen3-32B", "Qwen/Qwen2.5-72B-Instruct"
MOE_30B, MOE_235B = "Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-235B-A22B"

Changes = dict[str, object]


@dataclass(frozen=True)
class Run:
    """A published run: its devices and what it set."""

    model: str
    device: str
    num_devices: int
    lengths: tuple[int, int]
    axes: Changes
    rollout: Changes
    others: Changes


def axes(tp: int = 1, pp: int = 1, ep: int = 1, etp: int | None = None, cp: int = 1) -> Changes:
    return {
        f"{MEGATRON}.tensor_model_parallel_size": tp,
        f"{MEGATRON}.pipeline_model_parallel_size": pp,
        f"{MEGATRON}.expert_model_parallel_size": ep,
        f"{MEGATRON}.expert_tensor_parallel_size": etp,
        f"{MEGATRON}.context_parallel_size": cp,
    }


def engine(tp: int, utilization: float) -> Changes:
    return {
        f"{ROLLOUT}.tensor_model_parallel_size": tp,
        f"{ROLLOUT}.gpu_memory_utilization": utilization,
        f"{ROLLOUT}.n": 8,
    }


KL: Changes = {f"{ACTOR}.use_kl_loss": True}
NO_KL: Changes = {"algorithm.kl_free": True}


def plan(run: Run) -> RunPlan:
    """Return our plan of it."""
    nodes = -(-run.num_devices // 8)
    values = {
        "actor_rollout_ref.model.path": run.model,
        "algorithm.adv_estimator": "grpo",
        "trainer.nnodes": nodes,
        "trainer.n_gpus_per_node": min(8, run.num_devices),
        "data.max_prompt_length": run.lengths[0],
        "data.max_response_length": run.lengths[1],
        "data.train_batch_size": 512,
        f"{ACTOR}.ppo_mini_batch_size": 1024,
        f"{ACTOR}.ppo_micro_batch_size_per_gpu": 1,
        **run.axes,
        **run.rollout,
        **run.others,
    }
    checked = check_ppo(composed_values("ppo_megatron_trainer", **values), files_may_be_missing=True)
    return planned(checked, device(run.device, 8))


def dense_7b(layout: Changes, utilization: float, **others: object) -> Run:
    return Run(DENSE_7B, "H100", 8, (2048, 8192), layout, engine(1, utilization), {**KL, **others})


VERDICTS: list[tuple[str, Run, bool]] = [
    ("practice 7B row 2", dense_7b(axes(4), 0.6), True),
    ("practice 7B row 4", dense_7b(axes(2, cp=2), 0.8), False),
    ("practice 7B row 5", dense_7b(axes(2, cp=2), 0.5), False),
    ("practice 7B row 6", dense_7b(axes(2, cp=2), 0.5, **SWAP), True),
    ("practice 7B row 9", dense_7b(axes(2), 0.6, **SWAP), True),
    ("practice 7B row 10", dense_7b(axes(2), 0.6), False),
    ("practice 7B row 11", dense_7b(axes(2), 0.6, **FULL), False),
    ("practice 7B row 12", dense_7b(axes(2), 0.6, **SWAP, **FULL), True),
    (
        "practice 30B-A3B row 4",
        Run(MOE_30B, "H100", 16, (2048, 8192), axes(4, 1, 8, 1), engine(2, 0.5), {**NO_KL, **SWAP}),
        True,
    ),
    (
        "practice 30B-A3B row 8",
        Run(MOE_30B, "H100", 32, (2048, 8192), axes(2, 1, 8, 1), engine(4, 0.5), {**NO_KL, **SWAP, **FULL}),
        True,
    ),
    (
        "practice 30B-A3B rows 10-14",
        Run(MOE_30B, "H100", 32, (2048, 8192), axes(1, 1, 8, 1), engine(4, 0.6), {**NO_KL, **SWAP, **FULL}),
        True,
    ),
    (
        "slime 30B-A3B on one node",
        Run(MOE_30B, "H100", 8, (2048, 8192), axes(4, 1, 8, 1), engine(8, 0.7), {**KL, **ON_HOST, **FULL}),
        True,
    ),
    (
        "verl issue 3104, 30B-A3B",
        Run(MOE_30B, "H20", 16, (1024, 1024), axes(4, 1, 4, 1), engine(4, 0.6), KL),
        False,
    ),
    (
        "NeMo-RL issue 1130, 30B-A3B",
        Run(MOE_30B, "H100", 8, (1024, 3072), axes(1, 1, 8, 1), engine(2, 0.6), {**KL, **FULL}),
        False,
    ),
    (
        "practice 235B row 2",
        Run(MOE_235B, "H100", 256, (2048, 8192), axes(4, 8, 32, 1), engine(16, 0.7), {**NO_KL, **SWAP, **FULL}),
        True,
    ),
    (
        "practice 235B row 3",
        Run(MOE_235B, "H100", 128, (2048, 8192), axes(1, 8, 8, 1), engine(16, 0.6), {**NO_KL, **SWAP, **FULL}),
        True,
    ),
    (
        "verl issue 3360, 235B",
        Run(MOE_235B, "H100", 32, (2048, 4816), axes(4, 8, 4, 1), engine(8, 0.85), {**KL, **ON_HOST}),
        False,
    ),
]

# GiB that a rank was seen to hold in training. SFT of sequences of 8,192 tokens: the engine's part is left out.
MEASURED: list[tuple[str, Run, float]] = [
    (
        "ms-swift qwen3_moe.sh",
        Run(MOE_30B, "A100-80", 16, (4096, 4096), axes(1, 2, 8, 1), engine(1, 0.1), {**NO_KL, **FULL}),
        60,
    ),
    (
        "ms-swift full/moe.sh",
        Run(MOE_30B, "A100-80", 8, (4096, 4096), axes(4, 2, 4, 1), engine(1, 0.1), {**NO_KL, **FULL}),
        76,
    ),
    ("ms-swift base_to_chat.sh", Run(DENSE_14B, "A100-80", 8, (4096, 4096), axes(4), engine(1, 0.1), NO_KL), 65),
    (
        "ms-swift qwen3_32b.sh",
        Run(DENSE_32B, "A100-80", 8, (4096, 4096), axes(8), engine(1, 0.1), {**NO_KL, **FULL}),
        80,
    ),
    (
        "ms-swift qwen3_moe_offload.sh",
        Run(
            MOE_30B,
            "A100-80",
            4,
            (4096, 4096),
            axes(1, 1, 4, 1),
            engine(1, 0.1),
            {**NO_KL, **FULL, **ON_HOST, f"{MEGATRON}.param_offload": False, f"{MEGATRON}.grad_offload": False},
        ),
        75,
    ),
    (
        "ms-swift 72b_offload.sh",
        Run(DENSE_72B, "A100-80", 8, (4096, 4096), axes(8), engine(1, 0.1), {**NO_KL, **FULL, **ON_HOST}),
        65,
    ),
]


@pytest.mark.parametrize(("run", "it_ran"), [row[1:] for row in VERDICTS], ids=[row[0] for row in VERDICTS])
def test_the_verdict_is_what_was_reported(run: Run, it_ran: bool) -> None:
    assert plan(run).fits is it_ran


@pytest.mark.parametrize(("run", "gib"), [row[1:] for row in MEASURED], ids=[row[0] for row in MEASURED])
def test_an_update_holds_about_what_was_measured(run: Run, gib: float) -> None:
    """Measured is what the allocator reserved, in frameworks that keep float32 logits: more, never by a third."""
    [update] = [phase for phase in plan(run).phases if phase.name == "actor update"]
    held = sum(item.device_bytes for item in update.items if item.name != "sleeping engine") / GIB
    assert 0.7 * gib <= held <= gib


def _rows() -> None:
    """Print the tables of docs/plan.md."""
    for name, run, it_ran in VERDICTS:
        p = plan(run)
        layout = " ".join(f"{a.name.upper()}{a.size}" for a in p.topologies[0].axes if a.size > 1)
        verdict = f"fits, {p.room_bytes / GIB:.0f} left" if p.fits else f"lacks {-p.room_bytes / GIB:.0f}"
        outcome = "ran" if it_ran else "out of memory"
        print(f"| {name} | {run.num_devices} x {run.device} | {layout} | {outcome} | {verdict} ({p.worst.name}) |")
    for name, run, gib in MEASURED:
        [update] = [phase for phase in plan(run).phases if phase.name == "actor update"]
        held = sum(item.device_bytes for item in update.items if item.name != "sleeping engine") / GIB
        print(f"| {name} | {run.num_devices} x {run.device} | {gib} | {held:.0f} |")


if __name__ == "__main__":
    _rows()
