"""Mistakes that users of such stacks report: each is named before anything starts, with its key and what is allowed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megarl.config.command_line import parse_command_line
from megarl.config.compose import compose
from megarl.controller.check import CheckedPPO, check_ppo
from megarl.errors import ConfigError, DataError, MegarlError, ModelFolderError, RewardError
from tests.launch import python, run

MAIN = "ppo_megatron_trainer"
MODEL, ACTOR, ROLLOUT = "actor_rollout_ref.model", "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
REF, CRITIC, ALGORITHM = "actor_rollout_ref.ref", "critic", "algorithm"
CORRECTION, RANKS = "algorithm.rollout_correction", "trainer.n_gpus_per_node"
AXES, REF_AXES = f"{ACTOR}.megatron", f"{REF}.megatron"
TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
VPP, EP, ETP = (
    "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
MINI, MICRO = f"{ACTOR}.ppo_mini_batch_size", f"{ACTOR}.ppo_micro_batch_size_per_gpu"

# A run of 8 prompts x 4 = 32 rollouts on 2 ranks that makes no mistake. Its model has 2 layers, 4 heads and 2 key-value
# heads; 64 positions; the one named moe also has 4 experts.
SOUND = {
    f"{MODEL}.path": "model",
    f"{MODEL}.init": "random",
    "data.train_files": "[train.parquet]",
    "data.val_files": "[test.parquet]",
    "data.train_batch_size": "8",
    "data.max_prompt_length": "16",
    "data.max_response_length": "6",
    f"{ACTOR}.lr_scheduler.warmup_steps": "1",
    MINI: "16",
    MICRO: "4",
    f"{ACTOR}.use_kl_loss": "true",
    f"{ROLLOUT}.n": "4",
    "reward.path": "reward.py",
    f"{ALGORITHM}.adv_estimator": "grpo",
    RANKS: "2",
    "trainer.total_training_steps": "3",
}
GAE = (f"{ALGORITHM}.adv_estimator=gae", f"{ACTOR}.use_kl_loss=false")
FOUR = (f"{RANKS}=4",)


@dataclass(frozen=True)
class Mistake:
    """What is typed beside SOUND, the keys that the error names and what it says of the first.

    error: of a file of the user's, which names it and no key.
    """

    typed: tuple[str, ...]
    keys: tuple[str, ...]
    says: str
    error: type[MegarlError] = ConfigError


def _of(*typed: str, says: str, keys: Sequence[str] | None = None) -> Mistake:
    """Return a mistake in a key: in the last one typed, unless ``keys`` says which."""
    last = typed[-1].lstrip("+~").partition("=")[0]
    return Mistake(typed, (last,) if keys is None else tuple(keys), says)


def _in_file(*typed: str, says: str, error: type[MegarlError]) -> Mistake:
    return Mistake(typed, (), says, error)


MISTAKES = {
    # Axes.
    "TP that doesn't divide the heads": _of(
        f"{RANKS}=3", f"{MICRO}=1", f"{MINI}=4", f"{REF_AXES}.{TP}=1", f"{AXES}.{TP}=3",
        says="must divide the model's 4 attention heads", keys=[f"{AXES}.{TP}", f"{AXES}.{TP}", f"{AXES}.{TP}"]
    ),
}
