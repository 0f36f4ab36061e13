"""On whose nodes the engines of a run are: in processes of their own they may have nodes of their own."""

from __future__ import annotations

from enum import Enum

from megarl.config.schema import PPOConfig, SFTConfig
from megarl.roles import engine_ranks_per_node, engines_share_devices, is_served


class EnginePlacer(Enum):
    """Who starts engines in processes of their own, as a run finds it in its variables."""

    COMMAND = "the command, on its node"
    HOSTS = "a host on each of their nodes"
    RAY = "Ray, on nodes of a cluster that have room"


class EnginePlace(Enum):
    """On whose nodes engines are. ANYWHERE: on nodes of ranks where these have room, else on their own."""

    IN_RANKS = "in the ranks"
    BESIDE = "beside the ranks, on their node"
    APART = "on nodes of their own"
    ANYWHERE = "on any nodes"

    @property
    def is_across(self) -> bool:
        """Whether weights may have to cross from node to node."""
        return self in (EnginePlace.APART, EnginePlace.ANYWHERE)


def engine_place(c: PPOConfig | SFTConfig, placer: EnginePlacer) -> EnginePlace:
    """Return on whose nodes the engines of a checked run are. Without engines that is in the ranks."""
    if not isinstance(c, PPOConfig) or not is_served(c):
        return EnginePlace.IN_RANKS
    if engines_share_devices(c):
        return EnginePlace.BESIDE
    if placer is EnginePlacer.RAY:
        return EnginePlace.ANYWHERE
    are_on_one = c.trainer.nnodes == c.actor_rollout_ref.rollout.nnodes == 1
    # The command itself starts engines on its node alone: a plan of more nodes is made before who places them is there.
    return EnginePlace.BESIDE if are_on_one and placer is EnginePlacer.COMMAND else EnginePlace.APART


def processes_per_node(c: PPOConfig | SFTConfig, place: EnginePlace) -> int:
    """Return the most ranks that a node has, of the trainer's and of engines in processes of their own."""
    ranks = c.trainer.n_gpus_per_node
    if not isinstance(c, PPOConfig) or place is EnginePlace.IN_RANKS:
        return ranks
    engines = engine_ranks_per_node(c)
    return max(ranks, engines) if place is EnginePlace.APART else ranks + engines
