"""Optimizer steps that were skipped for their gradient's norm: what becomes of a run that has many of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megarl.checkpoint.folder import CheckpointFolder, verified_state
from megarl.checkpoint.trainer_state import TrainerState
from megarl.errors import WorkerError
from megarl.launchers.group import WorkerGroup, everywhere
from megarl.ranks.spec import Resumed
from megarl.ranks.worker import Worker
from megarl.train.work import SKIPPED
from megarl.types import Metrics

STOP, SKIP, ROLLBACK = "stop", "skip", "rollback"


def skipped_roles(metrics: Metrics) -> list[str]:
    """Return the roles that skipped an optimizer step, as a list of str."""
    return [name.partition("/")[0] for name, value in metrics.items() if name.endswith(f"/{SKIPPED}") and value]


@dataclass
class NonFinite:
    """Ends a run, or takes it back to its last checkpoint, after ``most`` steps in a row that skipped an update.

    policy: ``stop`` (at the first), ``skip`` (then stop) or ``rollback``. restore: takes up the controller's state.
    end_save: waits for a save that is under way, which is the last checkpoint then. in_a_row: until now; of a run that
    goes on, those before.
    """

    policy: str
    most: int
    group: WorkerGroup
    checkpoints: CheckpointFolder
    restore: Callable[[TrainerState], None]
    warn: Callable[[str], None]
    end_save: Callable[[], None]
    in_a_row: int = 0

    def after(self, step: int, metrics: Metrics) -> bool:
        """Look at a step's metrics; return whether models and controller have gone back to the last checkpoint.

        The place in the data stays: the same prompts would end the same way. Raises WorkerError where the run must end.
        """
        skipped = skipped_roles(metrics)
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if not skipped:
            return False
        told = (
            f"step {step}: the gradient norm of the {' and the '.join(skipped)} isn't finite, or is "
            "above optim.skip_grad_norm, and the optimizer step was not taken"
        )
        if self.policy == STOP or self.in_a_row >= self.most:
            self.end_save()
            if self.policy != ROLLBACK or not self.checkpoints.steps():
                row = f", as in the {self.in_a_row - 1} steps before" if self.in_a_row > 1 else ""
                raise WorkerError(
                    f"{told}{row}. Lower optim.lr, raise lr_scheduler.warmup_steps, or look at what it was for in "
                    "rollouts/non_finite_*; trainer.on_non_finite and trainer.max_non_finite_steps say what ends a run"
                )
            self._go_back(told)
            return True
        self.warn(f"{told}; rollouts/non_finite_step_{step}.jsonl has what it would have trained on")
        return False

    def _go_back(self, told: str) -> None:
        step = self.checkpoints.steps()[-1]
        folder = self.checkpoints.of(step)
        state = verified_state(folder)
        everywhere(self.group, Worker.load, Resumed(str(folder), state.updates))
        self.restore(state)
        self.in_a_row = 0
        self.warn(f"{told}, {self.most} times in a row: going on from the weights and the optimizer of step {step}")
