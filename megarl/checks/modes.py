"""Rules of ``trainer.mode``: what rollouts that are sampled ahead need."""

from __future__ import annotations

from collections.abc import Iterator

from megarl.algorithm.needs import estimator_needs, weighs_or_rejects
from megarl.config.schema import ASYNC, SYNC, PPOConfig
from megarl.errors import Problem
from megarl.roles import engines_share_devices, is_served

MODE = "trainer.mode"
_CORRECTION = "algorithm.rollout_correction"


def rollouts_ahead_are_sampled_beside_training(c: PPOConfig) -> Iterator[Problem]:
    """Engines that sample while ranks train are in processes of their own."""
    if c.trainer.mode != SYNC and not is_served(c):
        allowed = "samples while the ranks train, which engines in these ranks can't"
        yield Problem(MODE, c.trainer.mode, allowed, f"actor_rollout_ref.rollout.placement=server, or {MODE}={SYNC}")


def engines_on_the_trainers_devices_rest(c: PPOConfig) -> Iterator[Problem]:
    """Engines in processes of their own on the trainer's devices can rest while it trains, on its one node."""
    rollout, key = c.actor_rollout_ref.rollout, "actor_rollout_ref.rollout.n_gpus_per_node"
    if not (is_served(c) and engines_share_devices(c)):
        return
    others = {
        MODE: (
            c.trainer.mode,
            SYNC,
            "engines on the trainer's devices sample while it rests, and rest while it trains",
        ),
        "trainer.nnodes": (c.trainer.nnodes, 1, "engines on the trainer's devices start beside the command"),
        "actor_rollout_ref.rollout.nnodes": (rollout.nnodes, 1, "the trainer's devices are on one node"),
    }
    for other, (value, needed, why) in others.items():
        if value != needed:
            yield Problem(other, value, f"must be {needed} where {key} is 0: {why}", f"{other}={needed}, or {key}=null")


def rollouts_of_older_weights_are_corrected(c: PPOConfig) -> Iterator[Problem]:
    """Rollout correction acts where older weights sampled than those that are trained."""
    correction = c.algorithm.rollout_correction
    if c.trainer.mode != SYNC and not (
        weighs_or_rejects(c) or correction.bypass or correction.off_policy_mask_delta is not None
    ):
        allowed = f"trains on rollouts of older weights, and {_CORRECTION} does nothing about it"
        yield Problem(MODE, c.trainer.mode, allowed, f"{_CORRECTION}.preset=token_tis, or {MODE}={SYNC}")


def groups_of_several_versions_are_comparable(c: PPOConfig) -> Iterator[Problem]:
    """Nothing compares rollouts that must be of the same weights where weights change while groups are sampled."""
    if c.trainer.mode != ASYNC:
        return
    estimator, filters = c.algorithm.adv_estimator, "algorithm.filter_groups.enable"
    if estimator_needs(c).greedy_baseline:
        allowed = f"changes weights while a group is sampled, whose rollouts {estimator} compares with a greedy one"
        yield Problem(MODE, ASYNC, allowed, f"{MODE}=one_step_off, or another algorithm.adv_estimator")
    if c.algorithm.filter_groups.enable:
        allowed = f"replaces groups of a step, and {MODE}={ASYNC} takes what is complete"
        yield Problem(filters, True, allowed, f"{filters}=false, or {MODE}=one_step_off")
