"""Backends and their layouts are exchangeable: whole runs on four ranks give the same numbers and the same weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.launch import run, torchrun

NUM_RANKS, NUM_STEPS = 4, 3
FSDP = "actor_rollout_ref.actor.fsdp_config"
MEGATRON = "megatron TP2 PP2"
# The recipe of each backend, and its overrides.
BACKENDS = {
    MEGATRON: ("rl", "actor_rollout_ref.actor.megatron.pipeline_model_parallel_size=2"),
    "fsdp2": ("rl_fsdp",),
    "fsdp2, two copies": ("rl_fsdp", f"{FSDP}.fsdp_size=2"),
    "fsdp, ulysses 2": (
        *("rl_fsdp", "actor_rollout_ref.actor.strategy=fsdp", f"{FSDP}.ulysses_sequence_parallel_size=2"),
    ),
}
# Far above the rounding errors of gradients, which Adam would blow up where a gradient is next to zero.
SETTINGS = ("actor_rollout_ref.actor.optim.eps=1e-5", "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4")
# With a critic, and without what PPO doesn't take.
PPO = (
    *("algorithm.adv_estimator=gae", "critic.enable=true", "critic.model.path=model", "critic.model.init=random"),
    *("critic.optim.eps=1e-5", "actor_rollout_ref.actor.use_kl_loss=false", "actor_rollout_ref.rollout.n=2"),
)
ALGORITHMS: dict[str, tuple[str, ...]] = {"grpo": (), "ppo": PPO}
pytestmark = pytest.mark.long  # tests/e2e/test_ppo_run.py compares both backends on two ranks each time


@dataclass(frozen=True)
class Done:
    """The metrics of every step, without what depends on the clock, and the weights that were saved at the end."""

    printed: str
    metrics: list[dict[str, Any]]
    weights: dict[str, Tensor]


@pytest.fixture(scope="module")
def done_of(tiny_task: Path) -> Callable[[str, str], Done]:
    """Return what runs one of ALGORITHMS on one of BACKENDS, once each."""

    @cache
    def done(backend: str, algorithm: str) -> Done:
        recipe, *overrides = BACKENDS[backend]
        overrides += ALGORITHMS[algorithm]
        folder = tiny_task / f"{algorithm}_{backend}".replace(" ", "_").replace(",", "")
        command = (
            *("-m", "megarl.main_ppo", "--config-dir=.", f"--config-name={recipe}", *overrides, *SETTINGS),
            *(f"trainer.run_dir={folder}", f"trainer.n_gpus_per_node={NUM_RANKS}", "trainer.seed=1"),
            f"trainer.total_training_steps={NUM_STEPS}",
        )
        finished = run(torchrun(NUM_RANKS, *command), tiny_task)
        assert finished.code == 0, finished.output
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        metrics = [{k: v for k, v in line.items() if not k.startswith(("time_s", "wall_time"))} for line in lines]
        return Done(finished.stdout, metrics, load_file(folder / "checkpoints/final/model.safetensors"))

    return done


@pytest.mark.parametrize(
    ("backend", "algorithm"), [*((name, "grpo") for name in BACKENDS if name != MEGATRON), ("fsdp2", "ppo")]
)
def test_three_steps_give_the_numbers_and_the_weights_of_megatron(
    done_of: Callable[[str, str], Done], backend: str, algorithm: str
) -> None:
    found, expected = done_of(backend, algorithm), done_of(MEGATRON, algorithm)
    assert [line["step"] for line in found.metrics] == list(range(NUM_STEPS + 1))
    assert all(line["actor/grad_norm"] > 0 for line in found.metrics[1:])
    assert all((line.get("critic/grad_norm", 0) > 0) == (algorithm == "ppo") for line in found.metrics[1:])
    for line, expected_line in zip(found.metrics, expected.metrics, strict=True):
        assert line == pytest.approx(expected_line, rel=1e-5, abs=1e-5)
    assert found.weights.keys() == expected.weights.keys()
    for name, tensor in found.weights.items():
        torch.testing.assert_close(tensor, expected.weights[name], rtol=0, atol=1e-5)
    said = "actor_rollout_ref.actor.strategy = fsdp: sharded by fully_shard, as fsdp2 is"
    assert found.printed.count(said) == ("strategy=fsdp" in str(BACKENDS[backend]))
