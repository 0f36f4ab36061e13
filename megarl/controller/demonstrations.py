"""Supervised fine-tuning as a run of the same loop: its samples, its recipe, its evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor

from megarl.algorithm.recipe import ActorLogprobs, TrainBatch, Update
from megarl.batching.pack import sequences_to_batch
from megarl.controller.report import Evaluation
from megarl.controller.role_on_ranks import RoleOnRanks
from megarl.data.order import Order
from megarl.data.sft import SFTExample
from megarl.monitor.console import RolloutRow
from megarl.types import Metrics, Sequences


@dataclass(frozen=True)
class Demonstrations:
    """The chats of a step."""

    batch: Sequences


@dataclass(frozen=True)
class DemonstrationSampler:
    """Takes the chats of a step in their order."""

    examples: tuple[SFTExample, ...]
    order: Order

    def take(self, step: int) -> Demonstrations:
        """Return the chats of a step, counted from 1."""
        return Demonstrations(_padded([self.examples[i] for i in self.order.batch(step - 1)]))

    def paused(self) -> AbstractContextManager[None]:
        """Have no sampling go on for the duration: there is none."""
        return nullcontext()

    def sampled_rows(self) -> tuple[RolloutRow, ...]:
        """Return no rows: chats stand in the user's files."""
        return ()

    def every_row(self) -> tuple[RolloutRow, ...]:
        """Return no rows either."""
        return ()


class DemonstrationRecipe:
    """Trains on the chats as they are. last_loss: of the last step."""

    critic_warmup_steps = 0

    def __init__(self) -> None:
        self.last_loss = float("nan")

    def old_logprobs(self, samples: Demonstrations, actor: ActorLogprobs, step: int) -> None:
        """Return None: the loss compares with no older policy."""

    def train_batch(
        self, samples: Demonstrations, old_BS: Tensor | None, ref_BS: Tensor | None, values_BS: Tensor | None, step: int
    ) -> TrainBatch:
        """Return the chats."""
        return TrainBatch(samples.batch, None, {})

    def metrics(self, samples: Demonstrations, batch: TrainBatch, update: Update | None) -> Metrics:
        """Return the loss of the step."""
        assert update is not None
        self.last_loss = update.metrics["actor/loss"]
        return {"loss/train": self.last_loss}


@dataclass(frozen=True)
class DemonstrationLoss:
    """Evaluates by the mean loss a token over the validation chats; without any, tells the last step's own."""

    examples: tuple[SFTExample, ...]
    actor: RoleOnRanks
    recipe: DemonstrationRecipe

    def __call__(self, step: int) -> Evaluation:
        """Return the evaluation after ``step``."""
        if not self.examples:
            return Evaluation(step, self.recipe.last_loss, "loss of the last step", {})
        batch = _padded(self.examples)
        loss = float(-self.actor.logprobs(batch)[batch.mask_BS].mean())
        return Evaluation(step, loss, f"validation loss over {len(self.examples)} examples", {"loss/val": loss})


def _padded(examples: Sequence[SFTExample]) -> Sequences:
    return sequences_to_batch([e.token_ids for e in examples], [e.loss_mask for e in examples])
