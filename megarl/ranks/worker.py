"""One rank: the roles and the engine it holds a part of, and the verbs that the controller may call.

Imports torch; ``megarl.ranks.join`` prepares the platform before it imports this.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.algorithm.user_file import load_user_file
from megarl.checkpoint.rank_save import RankSave, SavedPart, restore_random_states
from megarl.checkpoint.role_files import SavedRole
from megarl.errors import ResourceError
from megarl.parallel.memory import DeviceMemory, MemoryByPhase
from megarl.ranks.across import Meeting
from megarl.ranks.publish import Publisher, SharedPublisher, publisher_of
from megarl.ranks.spec import RankSpec, Resumed
from megarl.ranks.work import GenerateWork, PublishWork, SaveWork
from megarl.roles import Role
from megarl.rollout.engine import RolloutEngine
from megarl.rollout.vllm import VllmEngine, VllmSpec
from megarl.train.actor import Actor
from megarl.train.backend import Backend
from megarl.train.backends import backend_of
from megarl.train.critic import Critic
from megarl.train.reference import Reference
from megarl.train.reward_model import RewardModel
from megarl.train.work import ScoreWork, Updated, UpdateWork
from megarl.types import Rollout
from megarl.weights.shared import Segment
from megarl.weights.sources import SafetensorsSource, TensorSource, drawn_weights


class RoleOnRank(Protocol):
    """One rank's part of a role."""

    backend: Backend

    def score(self, work: ScoreWork) -> Tensor | None:
        """Return the role's numbers of the rows on the rank that reports them, else None."""
        ...


KINDS: dict[str, type[Actor | Reference | Critic | RewardModel]] = {
    "actor": Actor,
    "ref": Reference,
    "critic": Critic,
    "reward_model": RewardModel,
}
"""The class of each role."""


class Worker:
    """This rank's share of a run. Every verb is called on all ranks together, with one value each."""

    def __init__(self, spec: RankSpec, device: torch.device) -> None:
        if spec.algorithm_file is not None:
            load_user_file(spec.algorithm_file)
        self.roles: dict[str, RoleOnRank] = {}
        self.device, self.memory = device, MemoryByPhase(device)
        self.saving: RankSave | SavedPart | None = None
        for role in spec.roles:
            self.roles[role.name] = KINDS[role.name](_backend(role, spec, device))
        self.engine: RolloutEngine | None = None
        self.publisher: Publisher | None = None
        self.engine_tp = 1
        if spec.engine is not None and spec.is_served:
            self.publisher = SharedPublisher(self.roles["actor"].backend, spec.engine)
        elif spec.engine is not None:
            assert isinstance(spec.engine, VllmSpec), "SGLang is never in the trainer's ranks"
            self.engine = VllmEngine(spec.engine)
            self.engine_tp = spec.engine.tensor_parallel_size
            self.publisher = publisher_of(self.roles["actor"].backend, self.engine, spec.engine.layout)
            self.engine.sleep()
        if spec.resumed is not None:
            restore_random_states(Path(spec.resumed.folder))

    def score(self, work: ScoreWork) -> Tensor | None:
        """Return a role's numbers of this data-parallel rank's rows, on the rank that reports them."""
        with self.memory.phase(f"{work.role} scoring"):
            return self.roles[work.role].score(work)

    def update(self, work: UpdateWork) -> Updated | None:
        """Take the optimizer steps of a role, and tell of them on the rank that reports them."""
        role = self.roles[work.role]
        assert isinstance(role, Actor | Critic), f"{work.role} is frozen"
        with self.memory.phase(f"{work.role} update"):
            updated = role.update(work)
        return updated if role.backend.place.reports else None

    def publish(self, work: PublishWork) -> Segment | None:
        """Move the actor's weights into the engine, or return where one in processes of its own finds them."""
        assert self.publisher is not None
        if self.engine is not None:
            self.engine.wake_weights()
        with self.memory.phase("publish"):
            return self.publisher.publish(work.policy_version, verify=work.verify)

    def segment(self, _: None) -> Segment:
        """Return where the weights for engines in processes of their own will be."""
        assert isinstance(self.publisher, SharedPublisher)
        return self.publisher.writer.segment

    def meet_hosts(self, meetings: tuple[Meeting, ...]) -> None:
        """Meet the hosts of engines, which every publication is sent to from now on."""
        assert isinstance(self.publisher, SharedPublisher)
        self.publisher.meet(meetings)

    def generate(self, work: GenerateWork) -> tuple[tuple[Rollout, ...], ...] | None:
        """Generate this replica's rollouts, and tell of them on its first rank."""
        assert self.engine is not None
        if self.engine.has_lost_weights:  # nothing has been published since: the actor's are still those
            self.publish(PublishWork(self.engine.policy_version))
        self.engine.wake_up()
        with self.memory.phase("generate"):
            rollouts = tuple(self.engine.generate(work.requests, work.sampling))
        return rollouts if dist.get_rank() % self.engine_tp == 0 else None

    def rest(self, _: None) -> None:
        """Give the engine's memory back for training."""
        assert self.engine is not None
        self.engine.sleep()

    def save(self, work: SaveWork) -> None:
        """Write the roles that are trained: the actor's model into the folder itself, any other's into its own."""
        folder = Path(work.folder)
        trained = {name: role.backend for name, role in self.roles.items() if role.backend.role.is_trained}
        try:
            for name, backend in trained.items():
                backend.export(folder if name == "actor" else folder / name, weights=work.models)
        except ResourceError as error:  # on all ranks: the run may go on
            self.saving = SavedPart(failure=str(error))
            return
        stateful = trained if work.state else {}
        self.saving = RankSave(folder, stateful, self.device, in_background=work.in_background)

    def saved(self, must_end: bool) -> SavedPart | None:
        """Return this rank's SavedPart; None as long as it is written, unless it ``must_end``."""
        if isinstance(self.saving, SavedPart):
            return self.saving
        assert self.saving is not None
        return self.saving.result() if must_end or self.saving.is_done() else None

    def load(self, resumed: Resumed) -> None:
        """Take up weights and optimizers of a checkpoint again."""
        for name, counts in resumed.updates.items():
            self.roles[name].backend.load(SavedRole(Path(resumed.folder), name), counts)

    def memory_used(self, _: None) -> dict[str, DeviceMemory]:
        """Return the largest DeviceMemory of every phase since it was last asked for; nothing on CPU."""
        return self.memory.drain()

    def shutdown(self, _: None) -> None:
        """Release the engine."""
        if self.engine is not None:
            self.engine.shutdown()


def _backend(role: Role, spec: RankSpec, device: torch.device) -> Backend:
    """Return the backend of a role, with the weights and the state that the run starts or goes on from."""
    counts = None if spec.resumed is None else spec.resumed.updates.get(role.name)
    if spec.resumed is None or counts is None:
        return backend_of(role, weights_of(role, spec.seed), device)
    saved = SavedRole(Path(spec.resumed.folder), role.name)
    backend = backend_of(role, saved if role.lora is None else weights_of(role, spec.seed), device)
    backend.load(saved, counts)
    return backend


def weights_of(role: Role, seed: int) -> TensorSource:
    """Return the weights that a role starts from."""
    if role.model.init == "random":
        return drawn_weights(role.shape, role.model.folder, seed)
    return SafetensorsSource(role.model.here(), role.shape, may_lack_value_head=role.name == "critic")
