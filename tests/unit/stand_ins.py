"""Ranks and a tokenizer that aren't there, so that what the controller asks of ranks can be seen without any."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from megarl.algorithm.samples import Samples
from megarl.config.schema import PPOConfig
from megarl.controller.engine_on_ranks import EngineOnRanks
from megarl.controller.inputs import PPOInputs
from megarl.controller.observer import Observer
from megarl.controller.open import rollout_run
from megarl.controller.run import Run
from megarl.data.order import Order
from megarl.monitor.preemption import Preemption
from megarl.monitor.sinks import Tracker
from megarl.types import Prompt
from tests.unit.composed_configs import roles_in

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Answers:
    """The answers of all ranks, which are there."""

    by_rank: list[Any]

    def result(self) -> list[Any]:
        return self.by_rank


@dataclass
class PlainRanks:
    """A WorkerGroup in this process. answer: what a rank answers, of its number, the verb's name and its argument.

    calls: every verb with its arguments by rank, in order.
    """

    world_size: int
    answer: Callable[[int, str, Any], Any] = lambda rank, verb, argument: None
    calls: list[tuple[str, list[Any]]] = field(default_factory=list)

    def submit(self, verb: Callable[..., Any], arguments: Sequence[Any]) -> Answers:
        assert len(arguments) == self.world_size
        self.calls.append((verb.__name__, list(arguments)))
        return Answers([self.answer(rank, verb.__name__, argument) for rank, argument in enumerate(arguments)])

    def shutdown(self) -> None:
        """End nothing."""

    def abort(self) -> None:
        """End nothing."""

    def verbs(self) -> list[str]:
        """Return the names of the verbs that were called, in order."""
        return [verb for verb, _ in self.calls]


class Words:
    """A tokenizer whose only token with a meaning is the end of a text."""

    eos_token_id = 2


def run_on(group: PlainRanks, config: PPOConfig, run_dir: Path) -> Run[Samples]:
    """Return an RL run of one prompt that never starts."""
    tokenizer = cast("PreTrainedTokenizerBase", Words())
    prompts = (Prompt("f:0", (3, 4), "three four", "source", "truth", {}, "f:0"),)
    inputs = PPOInputs(tokenizer, prompts, prompts, Order(1, 1, False, 0), 3, (2,), (), roles_in(config))
    engine = EngineOnRanks(group, config.actor_rollout_ref.rollout.tensor_model_parallel_size, Observer())
    preemption = Preemption(None, print)
    return rollout_run(config, inputs, group, engine, None, Tracker([]), run_dir, {}, None, Observer(), preemption)
